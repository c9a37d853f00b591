"""Set-up, build and patch tools behind the files in ``scripts/``; standard library only.

Read in this order: ``setup`` (what is made, and when), ``keys`` (what makes it stale), ``sdist``,
``patchset``, ``native`` and ``venv`` (the steps), ``run`` and ``progress`` (how a step is run).
"""
