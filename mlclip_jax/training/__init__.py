"""Loop, step, optimizer, mesh, checkpoints and metric writers."""
