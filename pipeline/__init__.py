"""What runs where and in which order: compile, run here, submit, schedule. Never touches a tensor."""
