"""What a served run writes down of each site's rows and rank."""

from __future__ import annotations

from fedloom.assembly.round_plan import Population
from fedloom.run_folder.reader import Holding, holdings_document
from fedloom.run_folder.writer import RunFolder


def write_holdings(folder: RunFolder, population: Population) -> None:
    """Write the rows that every site has told, and its rank."""
    holdings = [
        Holding(name, population.num_rows[client], population.ranks[client], {})
        for client, name in enumerate(population.names)
    ]
    folder.write_json("holdings.json", holdings_document(holdings, None))
