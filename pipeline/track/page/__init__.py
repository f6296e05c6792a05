"""The page: what happened in one run or many, to look at. No account, no network, nothing to install.

    journal -> reading (arrays) -> thin (what a screen can show) -> model (JSON) -> document (HTML) -> a file: `report`
                                                                                                    '-> serve: live

One document serves both: as a file it holds the model, live it fetches the same model piece by piece.
What it gives up: weights are not on it; it shows what the journal has, and the pictures that this names.
"""
