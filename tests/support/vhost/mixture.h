#pragma once
// A mixture of requests by many jobs at once, and an account of what each block of the disk may hold.

#include <atomic>
#include <functional>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "support/model.h"
#include "support/random.h"
#include "support/vhost/front_end.h"

namespace qcow::front {

using test::Random;
using test::Tick;
using test::Value;

inline constexpr std::uint64_t block_bytes = 4096;
inline constexpr std::uint64_t block_sectors = block_bytes / test::sector_bytes;

/// What each block may hold while changes overlap, whether or not servers are killed: what is complete stays. The
/// memory that it needs does not grow with time. Any thread may call it.
class BlockModel {
public:
    explicit BlockModel(std::uint64_t blocks) : blocks_(blocks) {}

    struct Range {
        std::uint64_t first = 0, count = 0;  ///< blocks
    };

    [[nodiscard]] Tick now() { return ++ticks_; }

    /// What is there before everything else. test::foreign stands for anything that no write leaves there.
    void preset(std::uint64_t block, Value value);

    /// A change has begun. `weak`: it need not have an effect.
    Tick begin(const Range& range, Value value, bool weak);
    void end(const Range& range, Tick begun);

    /// What is wrong with the contents of these blocks, which a read gave that began then. Blocks that changed
    /// meanwhile may hold a mixture, and are not compared.
    [[nodiscard]] std::optional<std::string> complaint(std::uint64_t first, std::span<const std::byte> bytes,
                                                       Tick begun) const;

private:
    static constexpr Tick never = ~Tick{0};

    struct Version {
        Value value = 0;
        Tick begin = 0;
        Tick end = never;
        bool weak = false;
    };
    struct Block {
        std::vector<Version> versions;
        Tick last_end = 0;
    };

    /// Whether all of what ended before this version is gone.
    [[nodiscard]] static bool replaces(const Version& later, const Version& earlier) {
        return !later.weak && later.end != never && earlier.end < later.begin;
    }

    mutable std::mutex mutex_;
    std::vector<Block> blocks_;
    std::atomic<Tick> ticks_ = 0;
};

/// Where the bytes that a mixture uses lie on the disk: in areas, each of which begins a stride after the one before.
/// The default is one area, at the beginning of the disk.
struct Spread {
    std::uint64_t area = std::uint64_t{1} << 62;  ///< bytes; whole blocks
    std::uint64_t stride = 0;

    [[nodiscard]] std::uint64_t place(std::uint64_t at) const { return at / area * stride + at % area; }
    /// The bytes that lie together from there on.
    [[nodiscard]] std::uint64_t rest(std::uint64_t at) const { return area - at % area; }
};

struct MixtureOptions {
    std::uint64_t bytes = 0;  ///< size of the part of the disk that it uses; whole blocks
    Spread spread = {};       ///< where it lies
    unsigned jobs = 16;
    unsigned depth = 32;    ///< requests that each job keeps in flight
    unsigned writes = 70;   ///< percent; the others are reads
    unsigned longest = 16;  ///< blocks of the longest read or write
    unsigned clears = 6;    ///< percent of the writes that are DISCARD or WRITE_ZEROES, where the server has them
    unsigned flushes = 1;   ///< percent of all requests
    std::uint64_t seed = 1;
};

/// Works on all queues of a front end at once. Each job has a sequence of requests of its own, which the seed decides:
/// reads and writes of 4 KiB and more in several segments, discards, zeroes with and without unmap, and flushes. Reads
/// are compared with the account when they end.
class Mixture {
public:
    /// The guest memory that it needs, beside that of the queues.
    static std::uint64_t memory_needed(const MixtureOptions& options);

    /// Reads the disk first, and takes what is there for its beginning.
    Mixture(FrontEnd& front, const MixtureOptions& options);

    /// Works until `enough` says so, and then completes what is in flight. Throws Disconnected when the server goes
    /// away; then the work can go on after FrontEnd::reconnect(). Throws std::runtime_error if a request
    /// fails or a read finds what cannot be there.
    void run(const std::function<bool()>& enough);

    /// Completes what is in flight.
    void finish() {
        run([] { return true; });
    }

    /// Reads all blocks, and throws std::runtime_error if one holds what cannot be there.
    void verify();

    BlockModel& model() { return model_; }

    [[nodiscard]] std::uint64_t requests() const { return requests_; }
    [[nodiscard]] std::uint64_t bytes() const { return bytes_; }
    /// "10 reads, 20 writes, ...".
    [[nodiscard]] std::string counts() const;

private:
    struct Request {
        std::uint32_t type = 0;
        BlockModel::Range range;
        Tick begun = 0;
        std::size_t job = 0;
        std::uint64_t buffer = 0;
    };
    struct Job {
        explicit Job(std::uint64_t seed) : random(seed) {}
        Random random;
        std::vector<std::uint64_t> free_buffers;
        std::optional<Request> waiting;  ///< for room in the queue
    };
    struct Worker {
        std::vector<std::size_t> jobs;
        std::map<Token, Request> in_flight;
    };

    void work(unsigned queue, const std::function<bool()>& enough);
    [[nodiscard]] Request next_request(std::size_t job);
    /// False if the queue has no room.
    bool submit(unsigned queue, const Request& request);
    void complete(Worker& worker, const Completion& completion);
    [[nodiscard]] BlockModel::Range choose(Random& random, std::uint64_t longest) const;
    /// Reads all blocks, in pieces: calls `found` with where each lies among them, when it began to be read, and it.
    using Found = std::function<void(std::uint64_t at, Tick begun, std::span<const std::byte> bytes)>;
    void read_all(const Found& found);

    FrontEnd& front_;
    MixtureOptions options_;
    BlockModel model_;
    std::vector<Job> jobs_;
    std::vector<Worker> workers_;
    std::atomic<Value> next_value_ = 1;
    std::atomic<std::uint64_t> requests_ = 0, bytes_ = 0;
    std::array<std::atomic<std::uint64_t>, VIRTIO_BLK_T_WRITE_ZEROES + 1> by_type_ = {};
    std::atomic<bool> stopped_ = false;
};

}  // namespace qcow::front
