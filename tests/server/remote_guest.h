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
    [[nodiscard]] std::optional<std::string> complaint(std::span<const Value> found);

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
    RemoteGuest(const std::string& socket, nbd::Style style, Account& account, Random random, const Load& load);

    /// Sends a few requests at once and takes the replies, in whatever order they come.
    void burst();

    [[nodiscard]] std::uint64_t requests() const { return requests_; }

private:
    struct Sent {
        nbd::Command command = {};
        Tick begun = 0;
        bool durable = false;
        std::vector<SectorModel::Change> changes = {};
    };

    Sent add_request(Wire& wire, std::uint64_t cookie);

    void settle(const Sent& sent);

    NbdClient client_;
    Account& account_;
    Random random_;
    Load load_;
    std::uint64_t requests_ = 0;
};

/// What is in every sector, as a client is told.
std::vector<Value> read_values(const std::string& socket, std::uint64_t sectors);

}  // namespace qcow::test
