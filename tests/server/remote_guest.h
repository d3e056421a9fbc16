#pragma once
// A guest at the other end of a connection, that keeps account of what its disk may hold.

#include <atomic>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "server/nbd_client.h"
#include "support/guest.h"
#include "support/model.h"
#include "support/random.h"

namespace qcow::test {

/// What is known of a disk that several guests use at once.
struct Account {
    Account(std::uint64_t size, std::uint64_t block_size, Value first_number)
        : sectors(size / sector_bytes), block(block_size / sector_bytes), model(sectors), next_value(first_number) {}

    Tick tick() { return ++ticks; }

    /// How the disk looks after a crash at this moment, in the first sector that should not look so.
    [[nodiscard]] std::optional<std::string> complaint(std::span<const Value> found) {
        const auto now = tick();
        const auto settled = model.settled_at(now);
        for (std::uint64_t i = 0; i < sectors; ++i) {
            if (!model.allows(i, found[i], settled, now)) return model.complaint(i, found[i], settled, now);
        }
        return std::nullopt;
    }

    std::uint64_t sectors;
    std::uint64_t block;  ///< sectors
    SectorModel model;
    std::atomic<Value> next_value;
    std::atomic<Tick> ticks = 1;
};

struct Load {
    unsigned flushes = 10;         ///< percent of the requests
    bool forgets_flushes = false;  ///< none reaches the server, although the account says so
};

/// Keeps several requests in flight on one connection. Throws Closed when the server goes away.
class RemoteGuest {
public:
    RemoteGuest(const std::string& socket, nbd::Style style, Account& account, Random random, const Load& load)
        : client_(socket), account_(account), random_(std::move(random)), load_(load) {
        client_.go(style);
    }

    /// Sends a few requests at once and takes the replies, in whatever order they come.
    void burst() {
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

    [[nodiscard]] std::uint64_t requests() const { return requests_; }

private:
    struct Sent {
        nbd::Command command = {};
        Tick begun = 0;
        bool durable = false;
        std::vector<SectorModel::Change> changes = {};
    };

    Sent add_request(Wire& wire, std::uint64_t cookie) {
        const auto longest = random_.pick({std::uint64_t{8}, std::uint64_t{64}, 2 * account_.block});
        auto first = random_.below(account_.sectors);
        auto count = random_.between(1, std::min(longest, account_.sectors - first));
        const auto dice = random_.below(10);
        Sent sent{.begun = account_.tick(), .durable = random_.chance(1 + load_.flushes / 4)};
        std::uint16_t flags = sent.durable && !load_.forgets_flushes ? nbd::command_flag::fua : 0;
        const auto add = [&](nbd::Command command, std::span<const std::byte> payload = {}) {
            sent.command = command;
            wire << client_.request(command, first * sector_bytes, count * sector_bytes, flags, cookie).bytes
                 << payload;
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

    void settle(const Sent& sent) {
        const auto ended = account_.tick();
        if (sent.command == nbd::Command::flush) account_.model.flushed(sent.begun, ended);
        for (const auto& change : sent.changes) account_.model.end(change, ended, sent.durable);
    }

    NbdClient client_;
    Account& account_;
    Random random_;
    Load load_;
    std::uint64_t requests_ = 0;
};

/// What is in every sector, as a client is told.
inline std::vector<Value> read_values(const std::string& socket, std::uint64_t sectors) {
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
