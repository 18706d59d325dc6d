"""The report says what happened, hides nothing, runs nothing and loads nothing."""

import copy
import re
import subprocess
import sys
from typing import Any

import pytest

from conf.schema.experiment import Experiment
from server.events import Evaluated, RoundFinished, RoundStarted, RunFinished, RunStarted, SiteReplied
from server.plots import plots
from server.report import _bound, _number, _seconds, _size, render_report, write_report
from server.summary import summarize
from tests.unit.server.report_cases import CONFIG, experiment, run_summary, statement
