"""`xact` in this process: many commands for one start of Python and its imports."""

import contextlib
import io

from megatron_xact import cli


def xact(*words) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command line."""
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            code = cli.main([str(word) for word in words])
        except SystemExit as ending:
            code = ending.code
    return code, out.getvalue(), error.getvalue()
