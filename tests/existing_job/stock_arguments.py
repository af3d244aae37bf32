"""What lies beside a stock script and is imported from its folder."""


def add_own_arguments(parser):
    parser.add_argument("--stock-script-says", default="nothing")
    parser.add_argument("--stock-script-builds-the-model", action="store_true")
    return parser
