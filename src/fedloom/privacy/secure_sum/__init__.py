"""A sum that nobody sees into: clients send numbers under masks that cancel in the sum, and in nothing less.

Client k sends ``x_k + PRG(b_k) + Σ_{j>k} PRG(s_kj) − Σ_{j<k} PRG(s_kj)`` in whole numbers modulo 2⁶⁴. Each pair agrees
on its s_kj; b_k is k's own. Secrets are shared among all, so that those who stay can help to take off the masks of
those who leave: of k either b_k or its key is ever told, never both. Four messages a client (:mod:`.member`,
:mod:`.server`): keys, shares, masked numbers, shares of what must be taken off.

Any t members can open a secret, fewer learn nothing of it. With t > 2n/3 a server that tells members different things
cannot get both secrets of one of them, while fewer than a third of them help it. By different lists of who stayed it
can still open the sum of fewer than it says: of at least half of all where none helps it. The server must pass on the
members' own keys: where it is not trusted to, members sign theirs.

Source: Bonawitz et al., Practical Secure Aggregation for Privacy-Preserving Machine Learning (2017), figure 4, without
its round of consistency checks. All ciphers and agreements are those of the package ``cryptography``.
"""
