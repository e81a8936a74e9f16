"""TransformerEngine's side of our activations, and the only folder that imports it. TE >= 2.13; joined MLPs >= 2.17.

TE's API says of itself that it may change: everything here keeps to what TE's own operations and modules do, and
tests/te runs it on several versions. Nothing is imported here, so that where TE is missing this much can be.
"""
