"""A sum that nobody sees into: clients send numbers under masks that cancel in the sum, and in nothing less.

Client k sends ``x_k + PRG(b_k) + Σ_{j>k} PRG(s_kj) − Σ_{j<k} PRG(s_kj)`` in whole numbers modulo 2⁶⁴. Each pair agrees
on its s_kj; b_k is k's own. Secrets are shared among all, so that those who stay can help to take off the masks of
those who leave: of k either b_k or its key is ever told, never both. Five messages a client (:mod:`.steps`): keys,
shares, masked numbers, a signature of the list of those whose numbers came, shares of what must be taken off.

Any t members can open a secret, fewer learn nothing of it. A member tells shares only where t members have signed the
very list that it was given. With t > 2n/3, and fewer than a third of the members helping a server that lies, no two
lists of one session get so many signatures: so either one sum is opened, of at least t members, or none. Members sign
their keys, so that a server cannot put its own in their place.

Source: Bonawitz et al., Practical Secure Aggregation for Privacy-Preserving Machine Learning (2017), figure 4, with its
round of consistency checks. All ciphers, signatures and agreements are those of the package ``cryptography``.
"""
