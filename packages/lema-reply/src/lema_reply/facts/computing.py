"""Computing: status codes, ports, acronyms, files, commands, languages and algorithms.

Sources: RFC 9110 (status codes); IANA's Service Name and Port Number Registry; IANA's media types; POSIX.1-2024 and
the Git reference manual (commands); each language's own site (years and creators); Cormen et al., Introduction to
Algorithms (costs).
"""

from __future__ import annotations

STATUS = (
    # The codes whose phrase is the same in all versions of Python's http.HTTPStatus.
    100, 101, 200, 201, 202, 203, 204, 205, 206, 300, 301, 302, 303, 304, 305, 307, 308, 400, 401, 402, 403, 404, 405,
    406, 407, 408, 409, 410, 411, 412, 415, 417, 418, 421, 423, 424, 425, 426, 428, 429, 431, 451, 500, 501, 502, 503,
    504, 505, 507, 508, 510, 511,
)  # fmt: skip

PORTS = {
    "FTP control": 21, "SSH": 22, "Telnet": 23, "SMTP": 25, "DNS": 53, "HTTP": 80, "POP3": 110, "NTP": 123,
    "IMAP": 143, "SNMP": 161, "BGP": 179, "TFTP": 69, "LDAP": 389, "HTTPS": 443, "syslog over UDP": 514, "LDAPS": 636,
    "IMAPS": 993, "POP3S": 995, "MQTT": 1883, "NFS": 2049, "MySQL": 3306, "RDP": 3389, "PostgreSQL": 5432, "AMQP": 5672,
    "VNC": 5900, "Redis": 6379, "MongoDB": 27017, "Kerberos": 88, "rsync": 873, "SIP": 5060,
}  # fmt: skip

ACRONYMS = {
    "CPU": ("central processing unit", "It runs the instructions of programs."),
    "GPU": ("graphics processing unit", "It computes many things at once, and trains neural networks too."),
    "RAM": ("random-access memory", "Its content is lost when the power goes."),
    "ROM": ("read-only memory", "Its content stays without power."),
    "SSD": ("solid-state drive", "It has no moving parts."),
    "HDD": ("hard disk drive", "It stores data on turning magnetic disks."),
    "USB": ("Universal Serial Bus", "Its first version appeared in 1996."),
    "HTML": ("HyperText Markup Language", "Web pages are written in it."),
    "CSS": ("Cascading Style Sheets", "It says how web pages look."),
    "HTTP": ("HyperText Transfer Protocol", "Browsers fetch pages with it."),
    "URL": ("Uniform Resource Locator", "It says where something is on the web."),
    "DNS": ("Domain Name System", "It turns names into addresses."),
    "IP": ("Internet Protocol", "It carries packets from network to network."),
    "TCP": ("Transmission Control Protocol", "It delivers bytes in order and repeats what was lost."),
    "UDP": ("User Datagram Protocol", "It sends packets without making sure that they arrive."),
    "SSH": ("Secure Shell", "It gives an encrypted session on another machine."),
    "TLS": ("Transport Layer Security", "It encrypts the traffic of HTTPS."),
    "VPN": ("virtual private network", "It carries a private network over a public one."),
    "LAN": ("local area network", "It connects machines in one place."),
    "WAN": ("wide area network", "It connects machines over long distances."),
    "API": ("application programming interface", "Programs talk to each other through it."),
    "SQL": ("Structured Query Language", "It asks questions of relational databases."),
    "JSON": ("JavaScript Object Notation", "It writes data as text."),
    "XML": ("Extensible Markup Language", "It marks up data with nested tags."),
    "YAML": ("YAML Ain't Markup Language", "The name contains itself."),
    "CSV": ("comma-separated values", "It writes a table as lines of text."),
    "PDF": ("Portable Document Format", "It looks the same on every machine."),
    "ASCII": ("American Standard Code for Information Interchange", "It has 128 characters."),
    "BIOS": ("Basic Input/Output System", "It starts a computer; UEFI took its place."),
    "GUI": ("graphical user interface", "It has windows, buttons and a pointer."),
    "CLI": ("command-line interface", "One types commands into it."),
    "IDE": ("integrated development environment", "It combines editor, debugger and build tools."),
    "OOP": ("object-oriented programming", "It joins data and the functions on it."),
    "LLM": ("large language model", "It predicts the next token of a text."),
    "NLP": ("natural language processing", "It is about computers and human language."),
    "RNN": ("recurrent neural network", "It reads a sequence one element after the other."),
    "CNN": ("convolutional neural network", "It is often used for images."),
    "OCR": ("optical character recognition", "It reads text out of pictures."),
    "ECC": ("error-correcting code", "Memory with it repairs single flipped bits."),
    "RAID": ("redundant array of independent disks", "It joins several disks to one."),
    "NAS": ("network-attached storage", "It is a disk that a network shares."),
    "DMA": ("direct memory access", "Devices read and write memory without the processor by it."),
    "MMU": ("memory management unit", "It turns virtual addresses into physical ones."),
    "ALU": ("arithmetic logic unit", "It is the part of a processor that computes."),
    "FPGA": ("field-programmable gate array", "Its circuits are set after it is made."),
    "REST": ("representational state transfer", "It is a style of web interfaces."),
    "CRUD": ("create, read, update, delete", "They are the basic operations on stored data."),
    "ACID": ("atomicity, consistency, isolation, durability", "Database transactions keep these four promises."),
    "UUID": ("universally unique identifier", "It has 128 bits."),
    "MAC address": ("media access control address", "It has 48 bits in Ethernet."),
    "DHCP": ("Dynamic Host Configuration Protocol", "It gives addresses to machines that join a network."),
    "NAT": ("network address translation", "It lets many machines share one public address."),
    "SMTP": ("Simple Mail Transfer Protocol", "Mail servers hand on mail with it."),
    "IMAP": ("Internet Message Access Protocol", "It reads mail that stays on the server."),
    "FTP": ("File Transfer Protocol", "It is older than the web."),
    "PNG": ("Portable Network Graphics", "It compresses images without loss."),
    "GIF": ("Graphics Interchange Format", "An image of it has at most 256 colours a frame."),
    "SVG": ("Scalable Vector Graphics", "It describes images by shapes, in XML."),
    "LoRA": ("low-rank adaptation", "It trains two small matrices beside each frozen one."),
    "PEFT": ("parameter-efficient fine-tuning", "LoRA is one of its methods."),
}  # fmt: skip
OTHER_WORDS = {
    "RAID": ("redundant array of inexpensive disks",),
    "HDD": ("hard drive",),
    "ECC": ("error correction code",),
}

FILE_TYPES = {
    ".py": "Python", ".js": "JavaScript", ".ts": "TypeScript", ".rs": "Rust", ".go": "Go", ".java": "Java",
    ".kt": "Kotlin",
    ".rb": "Ruby", ".swift": "Swift", ".hs": "Haskell", ".ex": "Elixir", ".lua": "Lua", ".jl": "Julia", ".php": "PHP",
    ".scala": "Scala", ".c": "C", ".cs": "C#", ".dart": "Dart", ".pl": "Perl", ".clj": "Clojure", ".f90": "Fortran",
    ".erl": "Erlang", ".zig": "Zig", ".nim": "Nim",
}  # fmt: skip

MEDIA_TYPES = {
    "HTML": "text/html", "CSS": "text/css", "plain text": "text/plain", "CSV": "text/csv", "JSON": "application/json",
    "PDF": "application/pdf", "ZIP": "application/zip", "PNG": "image/png", "JPEG": "image/jpeg", "GIF": "image/gif",
    "SVG": "image/svg+xml", "WebP": "image/webp", "MP4 video": "video/mp4", "JavaScript": "text/javascript",
    "gzip": "application/gzip", "WebAssembly": "application/wasm", "Markdown": "text/markdown",
}  # fmt: skip

COMMANDS = {
    # what it does: command, a true remark
    "lists the files of a directory": ("ls", "With -l it shows sizes and owners."),
    "changes the current directory": ("cd", "Without a name it goes home."),
    "prints the current directory": ("pwd", "The name means print working directory."),
    "copies files": ("cp", "With -r it copies directories too."),
    "moves or renames files": ("mv", "Within one file system nothing is copied."),
    "removes files": ("rm", "What it removes does not go to a bin."),
    "makes a directory": ("mkdir", "With -p it makes the parents too."),
    "searches text for a pattern": ("grep", "Its name comes from the ed command g/re/p."),
    "shows the first lines of a file": ("head", "It shows ten of them unless told."),
    "shows the last lines of a file": ("tail", "With -f it goes on as the file grows."),
    "counts lines, words and bytes": ("wc", "With -l it counts lines only."),
    "changes the permissions of a file": ("chmod", "Mode 644 lets the owner write and all read."),
    "changes the owner of a file": ("chown", "It usually needs the rights of root."),
    "shows free space on disks": ("df", "With -h sizes are easy to read."),
    "shows how much space files use": ("du", "With -s it prints the sum only."),
    "sends a signal to a process": ("kill", "Without an option it sends SIGTERM."),
    "lists running processes": ("ps", "With -e it lists those of all users."),
    "finds files by name or age": ("find", "It walks whole trees of directories."),
    "sorts lines of text": ("sort", "With -n it sorts by number."),
    "drops repeated neighbouring lines": ("uniq", "It is mostly used after sort."),
    "compares two files line by line": ("diff", "With -u its output can be used as a patch."),
    "packs files into one archive": ("tar", "Its name means tape archive."),
    "shows the manual of a command": ("man", "Section 1 has the commands of users."),
    "shows the content of a file": ("cat", "Its name comes from concatenate."),
    "edits a stream of text by rules": ("sed", "s/old/new/ replaces text."),
}  # fmt: skip

GIT = {
    "copies a remote repository": ("git clone", "It brings the whole history."),
    "records staged changes": ("git commit", "Each commit has a message."),
    "stages changes for the next commit": ("git add", "With -p it asks piece by piece."),
    "shows which files have changed": ("git status", "It names staged and unstaged ones apart."),
    "shows the history of commits": ("git log", "With --oneline each takes one line."),
    "joins another branch into this one": ("git merge", "It may need conflicts to be resolved."),
    "sends commits to a remote": ("git push", "It refuses to drop commits of others unless forced."),
    "fetches and merges from a remote": ("git pull", "It is git fetch and then a merge or rebase."),
    "puts commits on top of another base": ("git rebase", "It rewrites the commits."),
    "puts changes aside for later": ("git stash", "git stash pop brings them back."),
    "finds the commit that broke something by halving": ("git bisect", "It needs about log2 of the commits."),
    "says who last changed each line": ("git blame", "It shows a commit beside each line."),
    "starts a new repository": ("git init", "It makes a .git directory."),
    "undoes a commit by a new one": ("git revert", "History stays as it was."),
    "names a commit for good": ("git tag", "Releases are often marked so."),
}  # fmt: skip

LANGUAGES = {
    "Python": ("Guido van Rossum", 1991), "Ruby": ("Yukihiro Matsumoto", 1995), "Perl": ("Larry Wall", 1987),
    "PHP": ("Rasmus Lerdorf", 1995), "JavaScript": ("Brendan Eich", 1995), "Java": ("James Gosling", 1995),
    "C": ("Dennis Ritchie", 1972), "C++": ("Bjarne Stroustrup", 1985), "Pascal": ("Niklaus Wirth", 1970),
    "Lisp": ("John McCarthy", 1960), "Scala": ("Martin Odersky", 2004), "C#": ("Anders Hejlsberg", 2000),
    "Clojure": ("Rich Hickey", 2007), "Elixir": ("José Valim", 2012), "Fortran": ("John Backus", 1957),
    "Swift": ("Chris Lattner", 2014), "Zig": ("Andrew Kelley", 2016), "Erlang": ("Joe Armstrong", 1986),
}  # fmt: skip

COSTS = {
    "binary search": ("O(log n)", "It halves the range at each step."),
    "linear search": ("O(n)", "It may have to look at every element."),
    "merge sort": ("O(n log n)", "It is so in the worst case too."),
    "heapsort": ("O(n log n)", "It needs no second array."),
    "bubble sort": ("O(n^2)", "It compares neighbours again and again."),
    "insertion sort": ("O(n^2)", "It is fast on data that is nearly sorted."),
    "selection sort": ("O(n^2)", "It finds the smallest of the rest each time."),
    "quicksort": ("O(n^2)", "On average it takes O(n log n)."),
    "breadth-first search": ("O(V + E)", "It visits each vertex and edge once."),
    "depth-first search": ("O(V + E)", "It can be written with a stack."),
    "looking up an element of an array by index": ("O(1)", "The address is computed."),
    "the schoolbook product of two n by n matrices": ("O(n^3)", "Strassen's method takes fewer multiplications."),
    "the Floyd-Warshall algorithm": ("O(V^3)", "It finds the shortest paths between all pairs."),
}  # fmt: skip
