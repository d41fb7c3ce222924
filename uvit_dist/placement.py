"""On which hosts of an allocation the ranks run, when some are lost or have failed. A pure function.

In this order: the hosts that are sound, spares in place of those that are not; fewer hosts, where the configuration
allows it; none, and the job goes back to the queue.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Placement:
    """hosts: of the ranks, in SLURM's order; spares: sound ones that wait; left_out: the others, lost or blamed;
    stand_ins: those of hosts that would be spares, if all were well."""

    hosts: tuple[str, ...]
    spares: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    stand_ins: tuple[str, ...] = ()


def place(
    allocation: Sequence[str], lost: Collection[str], blamed: Collection[str], counts: Sequence[int]
) -> Placement | None:
    """Where the ranks run, or none where too few hosts are left.

    allocation: all hosts, in SLURM's order; lost: those that start no process; blamed: those that failed before, which
    are used only where there is no other; counts: numbers of nodes that the ranks may run on, the wanted one first.
    """
    sound = [host for host in allocation if host not in lost]
    count = next((count for count in counts if count <= len(sound)), None)
    if count is None:
        return None
    chosen = sorted(sound, key=lambda host: host in blamed)[:count]
    spares = [host for host in sound if host not in chosen and host not in blamed]
    return Placement(
        hosts=tuple(host for host in allocation if host in chosen),
        spares=tuple(spares),
        left_out=tuple(host for host in allocation if host not in chosen and host not in spares),
        stand_ins=tuple(host for host in allocation[counts[0] :] if host in chosen),
    )
