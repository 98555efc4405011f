"""Which part of the model a rank holds, and in which order it works: graphs, partitions, schedules."""

from hvdscale.model.actions import Action, Schedule
from hvdscale.model.graph import Edge, Graph, Node
from hvdscale.model.layout import Layout, Placement, Split
from hvdscale.model.mesh import Coordinates, Mesh
from hvdscale.model.partition import Partition, partition
from hvdscale.model.passes import chain_links, with_messages, with_recompute, with_reductions
from hvdscale.model.schedules import SCHEDULES, make_schedule
from hvdscale.model.simulate import Costs, Simulation, simulate

__all__ = [
    "SCHEDULES",
    "Action",
    "Coordinates",
    "Costs",
    "Edge",
    "Graph",
    "Layout",
    "Mesh",
    "Node",
    "Partition",
    "Placement",
    "Schedule",
    "Simulation",
    "Split",
    "chain_links",
    "make_schedule",
    "partition",
    "simulate",
    "with_messages",
    "with_recompute",
    "with_reductions",
]
