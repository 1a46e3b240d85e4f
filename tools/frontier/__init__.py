"""The parts of tools/accuracy_frontier.py."""
