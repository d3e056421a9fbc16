#include "server/remote_guest.h"

namespace qcow::test {

std::optional<std::string> Account::complaint(std::span<const Value> found) {
    const auto now = tick();
    const auto settled = model.settled_at(now);
    for (std::uint64_t i = 0; i < sectors; ++i) {
        if (!model.allows(i, found[i], settled, now)) return model.complaint(i, found[i], settled, now);
    }
    return std::nullopt;
}

RemoteGuest::RemoteGuest(const std::string& socket, nbd::Style style, Account& account, Random random, const Load& load)
    : client_(socket), account_(account), random_(std::move(random)), load_(load) {
    client_.go(style);
}

void RemoteGuest::burst() {
    std::map<std::uint64_t, Sent> in_flight;
    Wire wire;
    for (auto count = random_.between(1, 12); count > 0; --count) {
        const auto cookie = ++requests_;
        in_flight.emplace(cookie, add_request(wire, cookie));
    }
    client_.send(wire);
    while (!in_flight.empty()) {
        const auto reply = client_.chunk();
        const auto sent = in_flight.find(reply.cookie);
        if (sent == in_flight.end() || !reply.done) throw std::runtime_error("a reply that nobody waits for");
        if (reply.error != 0) throw std::runtime_error("refused with error " + std::to_string(reply.error));
        settle(sent->second);
        in_flight.erase(sent);
    }
}

RemoteGuest::Sent RemoteGuest::add_request(Wire& wire, std::uint64_t cookie) {
    const auto longest = random_.pick({std::uint64_t{8}, std::uint64_t{64}, 2 * account_.block});
    auto first = random_.below(account_.sectors);
    auto count = random_.between(1, std::min(longest, account_.sectors - first));
    const auto dice = random_.below(10);
    Sent sent{.begun = account_.tick(), .durable = random_.chance(1 + load_.flushes / 4)};
    std::uint16_t flags = sent.durable && !load_.forgets_flushes ? nbd::command_flag::fua : 0;
    const auto add = [&](nbd::Command command, std::span<const std::byte> payload = {}) {
        sent.command = command;
        wire << client_.request(command, first * sector_bytes, count * sector_bytes, flags, cookie).bytes << payload;
    };
    const auto change = [&](std::uint64_t at, std::uint64_t length, Value value, bool weak = false) {
        sent.changes.push_back(account_.model.begin(at, length, value, sent.begun, weak));
    };
    if (random_.chance(load_.flushes)) {
        first = count = flags = 0;
        add(load_.forgets_flushes ? nbd::Command::cache : nbd::Command::flush);
        sent.command = nbd::Command::flush;
    } else if (dice < 2) {
        change(first, count, 0);
        if (random_.chance(50)) flags |= nbd::command_flag::no_hole;
        add(nbd::Command::write_zeroes);
    } else if (dice < 4) {
        if (random_.chance(70)) {
            first = first / account_.block * account_.block;
            count = std::min(random_.between(1, 4) * account_.block, account_.sectors - first);
        }
        const Discarded range(first, count, account_.block, account_.sectors);
        change(range.first, range.count, 0);
        change(range.tail_first, range.tail_count, 0, true);
        add(nbd::Command::trim);
    } else {
        const auto value = account_.next_value++;
        change(first, count, value);
        add(nbd::Command::write, stamped(first, count, value));
    }
    return sent;
}

void RemoteGuest::settle(const Sent& sent) {
    const auto ended = account_.tick();
    if (sent.command == nbd::Command::flush) account_.model.flushed(sent.begun, ended);
    for (const auto& change : sent.changes) account_.model.end(change, ended, sent.durable);
}

std::vector<Value> read_values(const std::string& socket, std::uint64_t sectors) {
    NbdClient client(socket);
    client.go(nbd::Style::structured);
    std::vector<Value> result;
    while (result.size() < sectors) {
        const auto first = result.size();
        const auto count = std::min<std::uint64_t>(2048, sectors - first);
        const auto read = client.read(first * sector_bytes, count * sector_bytes);
        if (read.error != 0) throw std::runtime_error("cannot be read: error " + std::to_string(read.error));
        for (std::uint64_t i = 0; i < count; ++i)
            result.push_back(value_in(first + i, std::span(read.bytes).subspan(i * sector_bytes, sector_bytes)));
    }
    return result;
}

}  // namespace qcow::test
