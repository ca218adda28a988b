import io

from rich.table import Table

from align.common.console import plain_console


def test_what_is_printed_stands_as_it_is_whatever_brackets_and_colons_it_holds(monkeypatch):
    monkeypatch.setattr("sys.stdout", written := io.StringIO())
    console = plain_console()
    console.print("runs/a[red]b[/red] :smile: [/] " + "x" * 300)
    table = Table("name")
    table.add_row("a[bold]b")
    console.print(table)
    lines = written.getvalue().splitlines()
    assert lines[0] == "runs/a[red]b[/red] :smile: [/] " + "x" * 300
    assert any("a[bold]b" in line for line in lines)


def test_a_quiet_console_says_nothing(capsys):
    plain_console(quiet=True).print("a")
    assert capsys.readouterr().out == ""
