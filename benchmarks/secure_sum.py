"""What a secure sum costs by itself: processor seconds of a client and of the server, and bytes.

    python benchmarks/secure_sum.py [--clients 4 10 50] [--numbers 100000]

Members and server run one after another in one process. One member leaves after it has shared its secrets, so that the
server takes its masks off. Prints a line per number of clients.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from fedloom.privacy.secure_sum import member, server
from fedloom.privacy.secure_sum.fixed_point import from_ring, to_ring
from fedloom.privacy.secure_sum.identities import SIGNATURE_BYTES, local_identities
from fedloom.privacy.secure_sum.wire import Session, bytes_of_member, context_of
from fedloom.seeding import stream


def measure(num_clients: int, length: int) -> str:
    """Run one sum and return its line."""
    session = Session(context_of("benchmark"), tuple(range(num_clients)), 2 * num_clients // 3 + 1, length)
    numbers = {k: stream(1, "benchmark", k).normal(size=length) for k in session.members}
    clock = time.process_time
    laps = [clock()]
    own = local_identities(session.members)
    verify = own[0].verify
    begun = {k: member.begin(session, k, own[k].sign) for k in session.members}
    roster, told = server.roster(session, {k: message for k, (_, message) in begun.items()}, verify)
    shared = {k: member.shared(begun[k][0], told, verify) for k in session.members}
    laps.append(clock())
    delivered, posted = server.delivered(roster, {k: message for k, (_, message) in shared.items()})
    laps.append(clock())
    masked = {k: member.masked(shared[k][0], posted[k], to_ring(numbers[k], num_clients)) for k in session.members}
    laps.append(clock())
    uploads = {k: message for k, (_, message) in masked.items() if k != session.members[-1]}
    summed, survivors = server.summed(delivered, uploads)
    laps.append(clock())
    signed = {k: member.agreed(masked[k][0], survivors, own[k].sign) for k in summed.members}
    agreed, agreements = server.agreed(summed, {k: message for k, (_, message) in signed.items()})
    shares = {k: member.told(signed[k][0], agreements, verify) for k in summed.members}
    laps.append(clock())
    found = from_ring(server.unmasked(agreed, shares))
    laps.append(clock())
    wanted = sum((numbers[k] for k in summed.members), np.zeros(length))
    assert np.abs(found - wanted).max() < 1e-9
    spent = np.diff(laps)
    client, of_server = (spent[0] + spent[2] + spent[4]) / num_clients, spent[1] + spent[3] + spent[5]
    up, down = bytes_of_member(num_clients, length, SIGNATURE_BYTES)
    return (
        f"{num_clients} clients, {length:,} numbers each: a client {client:.3f} s, server {of_server:.3f} s, "
        f"{up:,} bytes up of which {up - 8 * length:,} beside the numbers, {down:,} down"
    )


def main() -> None:
    """Measure each number of clients."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[4, 10, 50])
    parser.add_argument("--numbers", type=int, default=100_000)
    chosen = parser.parse_args()
    for num_clients in chosen.clients:
        print(measure(num_clients, chosen.numbers), flush=True)


if __name__ == "__main__":
    main()
