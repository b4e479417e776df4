"""`python -m flows FLOW RUN`: one flow, run by hand."""

from flows.cli import run_command

if __name__ == "__main__":
    run_command()
