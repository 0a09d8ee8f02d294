"""``python -m flax_resnetv2 COMMAND``; with broken packages ``doctor`` lists these."""

import sys

from flax_resnetv2.cli import installed


def main() -> int:
    """Run the command that the arguments name."""
    try:
        from flax_resnetv2.cli import tools
    except Exception as error:
        if sys.argv[1:2] != ["doctor"]:
            raise
        text = (
            f"cannot be loaded ({installed.reason(error)}); repair the problems above"
        )
        last = installed.Finding("problem", "commands", text)
        findings = [*installed.python(), *installed.packages(), last]
        return installed.print_findings(findings)
    return tools.main()


if __name__ == "__main__":
    sys.exit(main())
