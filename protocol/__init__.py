"""What a server and its sites must agree on: tensors, instructions, replies, errors."""
