"""All that we take from transformers beyond its public interface, one file a concern.

Nothing else in the project imports more of transformers than the names at its top, which
``tests/swarm/compat/test_borders.py`` holds. What versions call or do differently is asked here (a signature, a class,
a trial with tiny tensors), never looked up by a version's number. ``tests/swarm/compat/test_contract.py`` has a test
for each assumption.
"""
