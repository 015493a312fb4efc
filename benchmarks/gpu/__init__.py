"""Everything that only a machine with a GPU can show, in one command: `make gpu`.

``__main__``  options, the plan, and the steps in order; it never touches the device itself
``plan``      the steps: what each does, in which order, and how much of the budget it may take
``steps``     what each step runs
``runner``    commands and workers as processes that are watched, restarted and stopped
``journal``   what a worker notes of each item, so that a worker that dies loses no result
``probe``     what there is: the device, the tools, the package; printed by a process of its own
``worker``    the process that verifies or times candidates on the device, with ``candidates``, ``timing`` and ``data``
``pytest_journal``  the same journal for tests
``report``    gpu.json and gpu.md
"""
