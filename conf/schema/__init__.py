"""One file per configuration group, the rules across groups, and the experiment they make up."""
