"""Writes the support requests of the quickstart: train.jsonl and heldout.jsonl, from templates and slots, seeded.

A request in free text becomes one sentence: who needs help, with which order and which product. Held-out requests share
no template, no name, no product and no order number with those that train, so that an exact match is not memory.

    python recipes/smollm2-moe/data/make.py
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

TRAIN, HELD_OUT = 120, 48
INSTRUCTION = 'Answer in this form: "Please help NAME with order NUMBER, the PRODUCT."'


class Slots(NamedTuple):
    """What fills the templates; names and products with commas between them."""

    names: str
    products: str
    orders: range


TRAIN_SLOTS = Slots(
    "Maria Lopez,John Carter,Aisha Khan,Peter Novak,Grace Kim,Omar Haddad,Lucy Brown,Ivan Petrov,Emma Wilson,"
    "Carlos Diaz,Nina Berg,Sam Taylor,Priya Patel,Tom Fischer,Olivia Martin,David Cohen,Hana Sato,Paul Dubois,"
    "Julia Rossi,Ben Adams,Fatima Ali,Mark Evans,Sofia Costa,Leo Hansen,Alice Green,Victor Lima,Anna Weber,"
    "Daniel Moore,Mei Chen,Rosa Silva",
    "desk lamp,coffee grinder,office chair,blue backpack,tea kettle,garden hose,wool blanket,phone charger,"
    "yoga mat,rice cooker,travel mug,wall clock,electric drill,toaster,bookshelf,camping tent,printer,"
    "bicycle helmet,hair dryer,wooden table,fan heater,guitar stand,floor mirror,laptop sleeve,bread knife,"
    "vacuum cleaner,radio,picture frame,air fryer,dog bed",
    range(1000, 5500),
)
HELD_OUT_SLOTS = Slots(
    "Helen Clark,Yusuf Demir,Clara Schmidt,Robert King,Linh Tran,Marta Nowak,George Hill,Amina Diallo,"
    "Eric Johansson,Laura Bianchi,Kevin Murphy,Zoe Pappas",
    "standing desk,water filter,winter jacket,record player,sewing machine,baby stroller,microwave,leather sofa,"
    "tennis racket,alarm clock,pressure cooker,keyboard",
    range(5500, 10000),
)

TRAIN_TEMPLATES = (
    "I was charged twice for the {product}. My order is {order}. Regards, {name}",
    "Hello, {name} here. You sent me the wrong invoice for order {order}, the {product}.",
    "My card was billed too much for order {order}. It was only one {product}! {name}",
    "Where is my refund for the {product}? Order {order}, thanks, {name}.",
    "This is {name}. The price of the {product} on my bill is not the price I saw. Order number {order}.",
    "Order {order}: the discount code was not applied to the {product}. Yours, {name}",
    "My name is {name} and I need a receipt for the {product} that I paid for, order {order}.",
    "I cancelled the {product} but the payment was still taken. {name}, order {order}.",
    "Could you explain the extra fee on order {order}? I bought a {product}. {name}",
    "{name} writing. The {product} from order {order} was paid by bank transfer and you still ask me for money.",
    "The {product} has not arrived yet. My order is {order}. Regards, {name}",
    "Hello, {name} here. The courier left order {order}, the {product}, at the wrong house.",
    "When will order {order} be shipped? I am waiting for the {product}! {name}",
    "Where is my package with the {product}? Order {order}, thanks, {name}.",
    "This is {name}. Please send the {product} to my new address. Order number {order}.",
    "Order {order}: the tracking page has shown nothing about the {product} for a week. Yours, {name}",
    "My name is {name} and the driver never rang with the {product}, order {order}.",
    "I was promised the {product} on Monday, and it is late. {name}, order {order}.",
    "Could you bring order {order} in the evening? It is a {product}. {name}",
    "{name} writing. The {product} from order {order} seems to be lost in the mail.",
    "The {product} broke after two days. My order is {order}. Regards, {name}",
    "Hello, {name} here. There is a crack in order {order}, the {product}.",
    "A part of order {order} is loose. Can somebody fix the {product}? {name}",
    "How can I get my {product} repaired? Order {order}, thanks, {name}.",
    "This is {name}. The {product} makes a strange noise when I use it. Order number {order}.",
    "Order {order}: the {product} stopped working last night. Yours, {name}",
    "My name is {name} and the {product} is damaged and needs a spare part, order {order}.",
    "I dropped the {product} and now a piece is bent. {name}, order {order}.",
    "Could you look at order {order}? The {product} is faulty. {name}",
    "{name} writing. The {product} from order {order} does not switch on any more.",
)
HELD_OUT_TEMPLATES = (
    "Good morning, my credit card statement lists the {product} two times. I am {name}, and the order is {order}.",
    "Please correct the invoice of {order}. The amount for the {product} is too high. Best wishes, {name}",
    "I returned the {product} weeks ago and still have no money back. {name} (order {order})",
    "{name}, order {order}. Why did I pay more for the {product} than your website says?",
    "Good morning, the parcel with the {product} is still not here. I am {name}, and the order is {order}.",
    "Please tell me the arrival date of {order}. I need the {product} soon. Best wishes, {name}",
    "The {product} was delivered to my neighbour by mistake. {name} (order {order})",
    "{name}, order {order}. Has the {product} left your warehouse, and when does it come?",
    "Good morning, a screw fell out and the {product} is broken. I am {name}, and the order is {order}.",
    "Please have a technician look at {order}. The {product} no longer works. Best wishes, {name}",
    "The {product} has a defect and I would like it fixed. {name} (order {order})",
    "{name}, order {order}. Smoke came out of the {product} and now it is dead, can you mend it?",
)


def requests(templates: Sequence[str], slots: Slots, count: int, seed: int) -> list[dict[str, Any]]:
    """`count` conversations, as many of each template as of the others, in random order."""
    rng = random.Random(seed)
    made = []
    for number, order in enumerate(rng.sample(slots.orders, count)):
        name, product = rng.choice(slots.names.split(",")), rng.choice(slots.products.split(","))
        request = templates[number % len(templates)].format(name=name, product=product, order=order)
        answer = f"Please help {name} with order {order}, the {product}."
        roles = {"system": INSTRUCTION, "user": request, "assistant": answer}
        made.append({"messages": [{"role": role, "content": content} for role, content in roles.items()]})
    rng.shuffle(made)
    return made


def files() -> dict[str, list[dict[str, Any]]]:
    """The conversations of each file."""
    return {
        "train": requests(TRAIN_TEMPLATES, TRAIN_SLOTS, TRAIN, seed=0),
        "heldout": requests(HELD_OUT_TEMPLATES, HELD_OUT_SLOTS, HELD_OUT, seed=1),
    }


def main() -> None:
    for name, rows in files().items():
        lines = [json.dumps(row) + "\n" for row in rows]
        (Path(__file__).parent / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
