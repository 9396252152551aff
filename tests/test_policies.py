"""The policies that ship here, by the suite that all policies are held to."""
from timm_width import policies
from timm_width.conformance import PolicyConformance


class TestUniform(PolicyConformance):
    policy = policies.load('uniform')
    regret = None  # it asks for no scores


class TestRandom(PolicyConformance):
    policy = policies.load('random')
    regret = 12.
    beats_random = False  # it is the best of as many


class TestAutoSlim(PolicyConformance):
    policy = policies.load('autoslim')
    # greedy slimming weighs what a step costs in accuracy, never what it saves: with scores free of noise and few groups, the
    # best of as many random networks is 2.1 points ahead of it on these problems
    beats_random = False
