"""Many runs: collect, group, compare and report them; the papers' tables beside ours."""
