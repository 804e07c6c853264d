"""What README promises in tables and examples holds."""

from pathlib import Path

from gateway.settings import settings_table

README = Path(__file__).parent.parent / "README.md"


def table() -> str:
    """The settings as README shows them."""
    rows = ["| setting | default | meaning |", "|---|---|---|"]
    for row in settings_table():
        default = f"`{row.default}`" if row.default else ""
        star = " \\*" if row.per_service else ""
        rows.append(f"| `{row.name}`{star} | {default} | {row.meaning} |")
    return "\n".join(rows)


def test_the_table_of_settings_is_complete_and_true() -> None:
    shown = README.read_text().split("<!-- settings -->\n")[1].split("\n<!-- /settings -->")[0]
    assert shown == table(), f"README's table of settings should be\n{table()}"
