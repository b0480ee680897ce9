"""Presidents and monarchs in order, with the year they took office.

Sources: whitehouse.gov, "Presidents"; royal.uk, "Kings and Queens from 1066".
"""

from __future__ import annotations

PRESIDENTS = (
    # Cleveland and Trump were president twice, not in a row, and are left out of questions that this makes ambiguous.
    ("George Washington", 1789), ("John Adams", 1797), ("Thomas Jefferson", 1801), ("James Madison", 1809),
    ("James Monroe", 1817), ("John Quincy Adams", 1825), ("Andrew Jackson", 1829), ("Martin Van Buren", 1837),
    ("William Henry Harrison", 1841), ("John Tyler", 1841), ("James K. Polk", 1845), ("Zachary Taylor", 1849),
    ("Millard Fillmore", 1850), ("Franklin Pierce", 1853), ("James Buchanan", 1857), ("Abraham Lincoln", 1861),
    ("Andrew Johnson", 1865), ("Ulysses S. Grant", 1869), ("Rutherford B. Hayes", 1877), ("James A. Garfield", 1881),
    ("Chester A. Arthur", 1881), ("Grover Cleveland", 1885), ("Benjamin Harrison", 1889), ("Grover Cleveland", 1893),
    ("William McKinley", 1897), ("Theodore Roosevelt", 1901), ("William Howard Taft", 1909), ("Woodrow Wilson", 1913),
    ("Warren G. Harding", 1921), ("Calvin Coolidge", 1923), ("Herbert Hoover", 1929), ("Franklin D. Roosevelt", 1933),
    ("Harry S. Truman", 1945), ("Dwight D. Eisenhower", 1953), ("John F. Kennedy", 1961), ("Lyndon B. Johnson", 1963),
    ("Richard Nixon", 1969), ("Gerald Ford", 1974), ("Jimmy Carter", 1977), ("Ronald Reagan", 1981),
    ("George H. W. Bush", 1989), ("Bill Clinton", 1993), ("George W. Bush", 2001), ("Barack Obama", 2009),
    ("Donald Trump", 2017), ("Joe Biden", 2021), ("Donald Trump", 2025),
)  # fmt: skip

MONARCHS = (
    ("William I", 1066), ("William II", 1087), ("Henry I", 1100), ("Stephen", 1135), ("Henry II", 1154),
    ("Richard I", 1189), ("John", 1199), ("Henry III", 1216), ("Edward I", 1272), ("Edward II", 1307),
    ("Edward III", 1327), ("Richard II", 1377), ("Henry IV", 1399), ("Henry V", 1413), ("Henry VI", 1422),
    ("Edward IV", 1461), ("Edward V", 1483), ("Richard III", 1483), ("Henry VII", 1485), ("Henry VIII", 1509),
    ("Edward VI", 1547), ("Mary I", 1553), ("Elizabeth I", 1558), ("James I", 1603), ("Charles I", 1625),
)  # fmt: skip

OTHER_SUCCESSORS = {"Edward IV": ("Henry VI",), "Edward VI": ("Lady Jane Grey", "Jane")}
"""Henry VI came back in 1470; Lady Jane Grey was proclaimed in 1553."""

LATER_MONARCHS = (
    ("George I", 1714), ("George II", 1727), ("George III", 1760), ("George IV", 1820),
    ("William IV", 1830), ("Victoria", 1837), ("Edward VII", 1901), ("George V", 1910), ("Edward VIII", 1936),
    ("George VI", 1936), ("Elizabeth II", 1952), ("Charles III", 2022),
)  # fmt: skip
