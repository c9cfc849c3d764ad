"""The first lines that run in a program's interpreter, behind the walls. Read as text and never imported.

Descriptor 3 holds the job, marshalled by the keeper; on descriptor 4 tests tell how they went. A line there begins with a
word that the program was not given. It could still find it in this interpreter's memory, see docs/rewards.md.
"""

import marshal
import os
import sys


def start() -> None:
    with open(3, "rb") as source:
        job = marshal.load(source)
    sys.path += job["packages"]
    sys.argv = ["program.py"]
    if job["tests"] is not None:
        test(job["program"], job["tests"], job["secret"])
    os.close(4)
    main = sys.modules["__main__"].__dict__
    for name in [name for name in main if not name.startswith("__")]:
        del main[name]  # of ours: the program finds an empty module
    exec(compile(job["program"], "program.py", "exec"), main)


def test(program: str, tests: list[str], secret: str) -> None:
    tell, leave = os.write, os._exit  # before the program can put others in their place

    def note(what: str) -> None:
        tell(4, f"{secret} {what}\n".encode(errors="replace"))

    names = {"__name__": "program", "__builtins__": __builtins__}
    try:
        exec(compile(program, "program.py", "exec"), names)
    except BaseException as error:
        note(f"program {type(error).__name__}: {str(error)[:200]!r}")
        leave(1)
    for index, text in enumerate(tests):
        try:
            exec(compile(text, f"test {index}", "exec"), dict(names))
        except BaseException as error:
            note(f"failed {index} {type(error).__name__}: {str(error)[:200]!r}")
        else:
            note(f"passed {index}")
    leave(0)


start()
