"""What a node costs an hour: the offers that sky/*.yaml names, and the price of the machine that this is.

Prices are those of SkyPilot's catalog in November 2026, for a node of 8 or of 1 H100 SXM with its host; `most` is what
the row of the file lets SkyPilot pay. Traffic out of a cloud to a bucket elsewhere is by list prices of 2026, from
memory; into the cloud, and to a bucket of the same cloud and region, it is free.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping

from job.errors import UsageError
from job.machine.cloud import Rental, rental
from job.machine.gpus import check_price

STORAGE = 0.023
"""dollars for a GB that lies in the bucket for a month: S3's list price, published"""


@dataclasses.dataclass(frozen=True)
class Offer:
    """One row of the files, or a line of docs/cloud.md. Dollars an hour."""

    cloud: str
    region: str
    """"" = any"""
    spot: bool
    gpus: int
    hour: float
    most: float

    @property
    def name(self) -> str:
        return "/".join(filter(None, (self.cloud, self.region))) + (", spot" if self.spot else "")


OFFERS = (
    Offer("nebius", "", True, 8, 10.00, 16),
    Offer("aws", "us-east-2", True, 8, 11.25, 16),
    Offer("gcp", "europe-north1", True, 8, 12.31, 16),
    Offer("nebius", "", False, 8, 23.60, 33),
    Offer("lambda", "", False, 8, 31.92, 33),
    Offer("gcp", "us-central1", False, 8, 43.07, 43.07),
    Offer("aws", "us-east-2", False, 8, 55.04, 55.04),
    Offer("nebius", "", False, 1, 2.95, 8),
    Offer("lambda", "", False, 1, 4.29, 8),
    Offer("aws", "us-east-2", False, 1, 6.88, 8),
)
EGRESS: dict[str, float | None] = {"aws": 0.02, "gcp": 0.12, "lambda": 0.0, "nebius": None}
"""dollars a GB out of the cloud; AWS's is to another of its regions. None: nobody told us"""
CONTROLLER = 0.05, 0.40
"""dollars an hour of the machine that `sky jobs launch` keeps while a managed job runs; a guess"""


@dataclasses.dataclass(frozen=True)
class Price:
    """Dollars an hour of all nodes, and who says so."""

    hour: float
    source: str


def price_here(
    given: float | None,
    at_most: float | None,
    *,
    gpus: int,
    nodes: int = 1,
    environment: Mapping[str, str] = os.environ,
) -> Price | None:
    """What this run's machines cost together: as `given` for them, by what SkyPilot says of this one, or `at_most`.

    As spot the most that the file allows is counted, since spot prices move; where nobody says whether it is spot, the
    dearest offer of that cloud. None where nothing is known; UsageError for a price that is not positive.
    """
    for option, price in (("--price", given), ("--price-at-most", at_most)):
        if price is not None:
            check_price(price, option)
    if given is not None:
        return Price(given, "--price")
    if (here := rental(environment)) and (offers := [o for o in OFFERS if _is_of(o, here, gpus)]):
        hour, name = max((offer.most if offer.spot else offer.hour, offer.name) for offer in offers)
        return Price(hour * nodes, f"SkyPilot rented it on {here.cloud} ({name}: catalog of November 2026)")
    if at_most is not None:
        return Price(at_most, "--price-at-most")
    return None


def _is_of(offer: Offer, here: Rental, gpus: int) -> bool:
    region = offer.region in ("", here.region)
    return (offer.cloud, offer.gpus) == (here.cloud, gpus) and region and here.spot in (None, offer.spot)


def check_limits(usd: float | None, hours: float | None, price: Price | None) -> None:
    """UsageError for a cap that is not positive, or for dollars that no price counts."""
    for option, value in (("--max-usd", usd), ("--max-hours", hours)):
        if value is not None and not 0 < value < 1e6:
            raise UsageError(f"{option} {value:g} cannot be used: give a positive number, e.g. {option} 80")
    if usd is not None and price is None:
        raise UsageError(
            "--max-usd needs a price, and nobody says what this machine costs: give --price, dollars an hour of all"
            " nodes, or --price-at-most"
        )
