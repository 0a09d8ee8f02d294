"""``python -m flax_resnetv2 COMMAND``.

The doctor says what is wrong with the packages where these keep ``tools`` from loading.
"""

import sys

from flax_resnetv2.cli import installed


def main() -> int:
    """Run the command that the arguments name."""
    if sys.argv[1:2] == ["doctor"]:
        try:
            import tyro  # noqa: F401  it is imported later

            from flax_resnetv2.cli import doctor  # noqa: F401  and this
        except Exception as error:
            text = f"cannot be loaded ({installed.reason(error)}); repair what is above"
            last = installed.Finding("problem", "commands", text)
            return installed.tell([*installed.python(), *installed.packages(), last])
    from flax_resnetv2.cli import tools

    return tools.main()


if __name__ == "__main__":
    sys.exit(main())
