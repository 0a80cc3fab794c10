"""Influent's maths: what to train on next, in what order, and how much each sample counts.

Axis vocabulary, used in every shape below and in no other sense:

=============  ======================================================================
``prompts``    prompts of a pool, a stage or a batch
``rollouts``   completions, of one prompt or of many, one row each
``tokens``     completion tokens, right-padded
``dim``        coordinates of a gradient: all of them, or those after projection
``targets``    validation sets, each reduced to one mean gradient
``stages``     stages of a curriculum
=============  ======================================================================

Log-probabilities are natural logarithms; ``logp_old`` was made by the policy that sampled, ``logp_new`` by the policy
that is being scored or trained. Functions of arrays are pure; devices and models appear only in ``policy``,
``generation``, ``gradients`` and ``training``.
"""
