"""Chance of our own. What a program seeds (``torch.manual_seed``, ``random.seed``, ``numpy.random.seed``) is its own: a
number drawn from there by us would change all that it draws afterwards, so nothing of ours does.

For shuffling and waiting a little longer or shorter there is :data:`CHANCE`. What is computed on random data brings a
``torch.Generator``.
"""

from __future__ import annotations

from random import SystemRandom

CHANCE = SystemRandom()
"""Has the methods of the module ``random``. Has no state either, so processes that are forked don't draw alike."""
