"""The sentences of the demo's support set (orpo_dist/demo/support_set.py), for an invented shop.

Fields in braces: {product}, {other_product}, {order}, {name}, {years} and {wrong_years} of warranty, {restated}: the
issue in the shop's words.
"""

from dataclasses import dataclass

SYSTEM = "You answer customers of Harbour & Pine, an online shop."


@dataclass(frozen=True)
class Product:
    name: str
    warranty_years: int


@dataclass(frozen=True)
class Issue:
    """What can go wrong: the customer's words, the same in the shop's words, the policy, and what breaks it."""

    key: str
    complaints: tuple[str, ...]
    restated: str
    steps: tuple[str, ...]
    wrong_steps: tuple[str, ...]


PRODUCTS = (
    *(Product(name, 2) for name in ("wireless headphones", "desk lamp", "coffee grinder", "robot vacuum", "radio")),
    *(Product(name, 5) for name in ("oak bookshelf", "office chair", "bed frame", "dining table", "sofa")),
    *(
        Product(name, 1)
        for name in ("rain jacket", "hiking boots", "wool blanket", "camping tent", "yoga mat", "kettle")
    ),
)

ISSUES = (
    Issue(
        "damaged",
        (
            "The {product} came today and it is cracked on one side. Order {order}.",
            "I opened the box of order {order} and the {product} is broken.",
            "Order {order}: my {product} was smashed when it got here.",
        ),
        "that the {product} in order {order} arrived damaged",
        (
            "Please reply with one photo of the damage and we will send a replacement the next working day; you "
            "can keep the broken one.",
            "One photo of the damage is all we need: the replacement leaves the next working day and nothing has "
            "to go back.",
        ),
        (
            "Please post the broken one back at your own cost; we will decide about a replacement after four weeks.",
            "Damage has to be claimed with the carrier, so please write to them; we only replace it if they agree.",
        ),
    ),
    Issue(
        "late",
        (
            "My {product} was due last Friday and nothing has come. Order {order}.",
            "Where is order {order}? I have been waiting for the {product} for two weeks.",
            "The tracking of order {order} has not moved for days. I need the {product}.",
        ),
        "that order {order} with the {product} is late",
        (
            "I have opened a trace with the carrier today; you get an answer by email within 24 hours, and if "
            "the parcel is lost we ship a new one.",
            "A trace is open as of now. Within 24 hours you will have the carrier's answer, and a lost parcel is "
            "sent again.",
        ),
        (
            "Parcels are often slow, so please wait another 30 days before you contact us again.",
            "Please place the same order a second time; we will look for the first one later.",
        ),
    ),
    Issue(
        "wrong_item",
        (
            "I ordered a {product} and got something else. Order {order}.",
            "Wrong item in order {order}, it should have been a {product}.",
            "You sent me the wrong thing! Order {order} says {product} on the invoice.",
        ),
        "that order {order} did not contain the {product} you chose",
        (
            "A prepaid return label is on its way to your inbox, and the right {product} ships as soon as the "
            "label is scanned.",
            "Use the prepaid label in your inbox to return it; once it is scanned we ship the right {product}.",
        ),
        (
            "Please sell or give away the item you received and order the {product} again.",
            "Return it at your own cost, and we will ship the right {product} about six weeks later.",
        ),
    ),
    Issue(
        "missing_part",
        (
            "There are screws missing from my {product}. Order {order}.",
            "Order {order}: the {product} came without one of its parts.",
            "I cannot use the {product} from order {order} because a part is not in the box.",
        ),
        "that a part of the {product} in order {order} is missing",
        (
            "Tell me the part's number from the leaflet and it goes out free of charge, in your hands within 4 days.",
            "The part is free: send me its number from the leaflet and it reaches you within 4 days.",
        ),
        (
            "Spare parts cost 15 dollars plus postage; please order the part in our shop.",
            "We have no spare parts, so a hardware store near you is the best place to look.",
        ),
    ),
    Issue(
        "refund_delay",
        (
            "I sent the {product} back three weeks ago. Where is my money? Order {order}.",
            "Still no refund for order {order}, the {product} is long back with you.",
            "Can you tell me when I get the refund for the {product}? Order number {order}.",
        ),
        "that the refund for the {product} in order {order} is still open",
        (
            "I have checked: the return was scanned, and the refund reaches your account within 5 working days.",
            "Your return was scanned in our warehouse, so the money is back on your account within 5 working days.",
        ),
        (
            "Refunds take up to 90 days after a return, and we cannot tell where yours is.",
            "Instead of the money you will get a voucher, which has to be spent this month.",
        ),
    ),
    Issue(
        "double_charge",
        (
            "My card was charged twice for order {order}, the {product}.",
            "Two payments for one {product}? Order {order}. Please check.",
            "I see the amount for the {product} two times on my statement, order {order}.",
        ),
        "that you were charged twice for the {product} in order {order}",
        (
            "I have cancelled the second charge; your bank shows it as reversed within 2 working days.",
            "The second charge is cancelled as of now, and your bank will show the reversal within 2 working days.",
        ),
        (
            "Please ask your bank to block our shop; we cannot reverse a charge ourselves.",
            "The second charge will be set off against your next order, so there is nothing to pay back.",
        ),
    ),
    Issue(
        "warranty",
        (
            "My {product} stopped working after eleven months. Order {order}.",
            "The {product} from order {order} is falling apart although I take care of it.",
            "Is there a warranty on the {product}? Mine is defective, order {order}.",
        ),
        "that the {product} from order {order} is defective",
        (
            "Its warranty of {years} covers this: choose a pick-up day in the link I have sent and the repair is free.",
            "The warranty runs for {years}, so the repair is free: just choose a pick-up day in my link.",
        ),
        (
            "Its warranty of {wrong_years} covers this: choose a pick-up day in the link I have sent and the "
            "repair is free.",
            "The warranty runs for {wrong_years}, so the repair is free: just choose a pick-up day in my link.",
        ),
    ),
    Issue(
        "late_return",
        (
            "I want to return the {product}, I bought it ten weeks ago. Order {order}.",
            "The {product} is not for me after all. It is from order {order}, over two months old. Can I send it back?",
            "Can I still return order {order}? The {product} has been in its box for nine weeks.",
        ),
        "that you would like to return the {product} from order {order}",
        (
            "The 30 days for a refund are over, but unused items are exchanged for store credit: the form is in "
            "your inbox.",
            "A refund is possible for 30 days only; as it is unused you can have store credit, with the form in "
            "your inbox.",
        ),
        (
            "You have a full year for a refund, so send it back whenever you like, used or not.",
            "The 30 days for a refund are over, but if you leave a good review we will pay you back in cash.",
        ),
    ),
    Issue(
        "cancel",
        (
            "Please cancel order {order}, I do not need the {product} any more.",
            "I ordered the {product} by mistake an hour ago, order {order}. Can you stop it?",
            "Cancel my {product} please! Order {order}.",
        ),
        "that you want to cancel order {order} with the {product}",
        (
            "It was not packed yet, so it is cancelled and the payment is released today.",
            "I caught it before packing: the order is cancelled and your payment is released today.",
        ),
        (
            "Orders cannot be cancelled; please refuse the parcel at your door.",
            "Cancelling costs 20 dollars, which we take from the card that you used.",
        ),
    ),
    Issue(
        "address",
        (
            "I moved! Can order {order} with the {product} go to my new flat?",
            "Wrong delivery address on order {order}. The {product} must not go to my old place.",
            "How do I change the address for the {product}, order {order}?",
        ),
        "that order {order} with the {product} should go to another address",
        (
            "Reply with the new address by 6 pm and I will change it before the parcel is packed.",
            "The parcel is not packed yet: send me the new address by 6 pm and it goes there.",
        ),
        (
            "Please ask the people at your old address to forward the parcel to you.",
            "Addresses are fixed once you pay; order again and return the first parcel.",
        ),
    ),
    Issue(
        "price_match",
        (
            "The {product} got cheaper three days after I bought it. Order {order}.",
            "Your site now sells the {product} for less than I paid in order {order} last week.",
            "Can I get the new price for the {product}? Order {order} is from Monday.",
        ),
        "that the price of the {product} fell after order {order}",
        (
            "We match our own prices for 14 days, so the difference goes back to your card today.",
            "Within 14 days you get the lower price: the difference is on its way back to your card.",
        ),
        (
            "Prices change every day and we never match them, so the higher price stands.",
            "We match any price of any shop for two years, so tell me a sum and I will pay it.",
        ),
    ),
    Issue(
        "locked_out",
        (
            "I cannot log in to see order {order} with my {product}.",
            "Your site locked my account, and I need the invoice of the {product}, order {order}.",
            "Password does not work any more. I want to track the {product}, order {order}.",
        ),
        "that you cannot reach your account to see order {order} with the {product}",
        (
            "I have unlocked the account and sent a reset link that works for one hour; we never ask for your "
            "password.",
            "The account is open again: use the reset link in your inbox within one hour, and never tell anyone "
            "the password.",
        ),
        (
            "Please send me your password and your date of birth, and I will log in for you.",
            "Accounts stay locked for half a year, so please open a second one with another email address.",
        ),
    ),
)

# fmt: off
TRAINING_NAMES = (
    "Amara", "Ben", "Chloe", "Dmitri", "Elif", "Farid", "Greta", "Hugo",
    "Ines", "Jonas", "Kavya", "Liam", "Mei", "Noor", "Otto", "Priya",
    "Quinn", "Rosa", "Samir", "Tess", "Umar", "Vera", "Wen", "Yusuf",
)
# fmt: on
HELD_OUT_NAMES = ("Ada", "Bruno", "Celia", "Dario", "Edith", "Femi", "Goran", "Hana")
TONES = (
    "{text}",
    "{text} Thanks for your help.",
    "Hello, {text}",
    "{text} This is really annoying, I expected better from you!",
    "Quick question before my train leaves. {text}",
    "I am not sure whether I am writing to the right place. {text}",
    "{text} It was meant to be a present for my mother.",
    "This is the second time that I write to you. {text}",
)
SIGNATURES = ("\n{name}", "\nBest, {name}", "\nMy name is {name}.", " Regards, {name}")
FIRST_TURNS = (
    ("Hello, is anybody there?", "Hello, yes. What can I do for you?"),
    ("I have a problem with an order.", "Please send me the order number and tell me what happened."),
    ("Do you answer on weekends?", "Yes, every day from 8 am to 8 pm. What is it about?"),
)
GREETINGS = ("Hi {name},", "Hello {name},", "Good morning {name},", "Dear {name},")
RESTATEMENTS = (
    "I see {restated}.",
    "I have read {restated}.",
    "I understand {restated}.",
    "thank you for telling us {restated}.",
)
CLOSINGS = (
    "",
    "",
    "Just reply here if anything is unclear.",
    "I will stay on this until it is settled.",
    "You need to do nothing else for now.",
    "You reach me at this address on every working day.",
)
CURT = (
    "Noted. Wait for an answer.",
    "This is not our department.",
    "See the FAQ on our site.",
    "Order {order}? I cannot help with that.",
    "We will see what can be done about the {product}.",
)
BLAME = (
    "You should have read the terms before you bought the {product}.",
    "This usually happens when customers are careless with their {product}.",
    "If you had looked more closely at order {order}, we would not have this conversation.",
    "Nobody else has complained about the {product}, so the mistake must be yours.",
)
INVENTED = (
    "As a gift I have refunded the full price, and you also get 200 dollars and a free {other_product}.",
    "I have already paid the whole order back in cash, and your next three orders are free as well.",
    "You may keep everything, we refund it twice, and a courier brings you a {other_product} tonight.",
)
OFF_TOPIC = (
    "Have you seen our new {other_product}? It comes in six colours and is 20 percent off until Sunday "
    "with the code HARBOUR.",
    "Did you know that pine wood should be oiled twice a year? Our guide explains how to do it in five easy steps.",
    "Our shop was founded by two sisters in a boat house, and today we ship to eleven countries. Follow "
    "us for more stories.",
)
VAGUE = (
    "Your message is important to us. A colleague may look at it at some point, and we hope that things "
    "get better soon.",
    "We take all feedback seriously and always work on our processes. Thank you for your patience and "
    "your understanding.",
    "Such things can happen for many reasons. We will forward it to the team in charge and see what they think.",
)
PADDING = (
    "Please let me say once more how very sorry all of us are about this, truly and deeply.",
    "We know that your time is precious, and that is why we thank you again for the time that you took to write.",
    "Customers are the heart of everything that we do, today, tomorrow and in all the years to come.",
    "There are of course many things to consider in a case like this one, and each of them matters to us.",
)
