# What scripts do: names counted in a dictionary, objects made and called, lists sorted, text put together.
class Counter:
    def __init__(self):
        self.counts = {}

    def add(self, name):
        self.counts[name] = self.counts.get(name, 0) + 1


counter = Counter()
state = 1
total = 0
for i in range(120000):
    state = (state * 1103515245 + 12345) & 0x7FFFFFFF
    counter.add("name%d" % (state % 5003))
    total += state % (i + 7)
ranked = sorted(counter.counts.items(), key=lambda item: (-item[1], item[0]))
text = ",".join("%s=%d" % item for item in ranked)
value = 0
for c in text:
    value = (value * 31 + ord(c)) % 1000000007
print(total, value, 3**500 % 1000003)
