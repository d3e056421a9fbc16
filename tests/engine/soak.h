#pragma once
// Many threads on one image, for a while; and requests that are overtaken by the end of what they work on.

#include <chrono>
#include <optional>
#include <string>

#include "engine/workload.h"
#include "support/disks.h"
#include "support/held_storage.h"

namespace qcow::test {

struct SoakReport {
    std::uint64_t requests = 0;
    std::optional<std::string> violation;
};

/// Overlapping requests of `threads` threads, each read held against all that it may give.
inline SoakReport soak(Image& image, const Mix& mix, bool discards_read_as_zeros, unsigned threads,
                       std::chrono::milliseconds duration, Random& random) try {
    std::atomic<Tick> ticks = 1;
    std::atomic<std::uint64_t> requests = 0;
    const auto end = std::chrono::steady_clock::now() + duration;
    // In rounds, so that the past can be forgotten.
    for (Value round = 1; std::chrono::steady_clock::now() < end; ++round) {
        SectorModel model(image.size() / sector_bytes);
        Guest guest(image, model, [&] { return ++ticks; }, discards_read_as_zeros, round << 32);
        guest.adopt();
        const auto round_end = std::min(end, std::chrono::steady_clock::now() + std::chrono::milliseconds(250));
        std::vector<Random> randoms;
        for (unsigned t = 0; t < threads; ++t) randoms.emplace_back(random.below(~std::uint64_t{0}));
        in_threads(threads, [&](unsigned t) {
            Worker worker(guest, mix, randoms[t]);
            for (; std::chrono::steady_clock::now() < round_end; ++requests) {
                if (const auto done = worker.step(); !done) throw std::runtime_error(done.error().message());
            }
        });
        if (auto wrong = guest.verify(0, guest.sectors())) return {requests, wrong};
    }
    return {requests, std::nullopt};
} catch (const std::exception& e) {
    return {0, e.what()};
}

/// A request on the first block is stopped just before its read or write of the file `held`. Meanwhile the block is
/// discarded, that is made durable, and blocks are filled until its place would be used again; then the request goes
/// on. Nobody may get what is not his.
inline std::optional<std::string> overtake(Image& image, HeldStorage& held, HeldStorage::Operation operation,
                                           bool discards_read_as_zeros) try {
    const auto block = image.block_size() / sector_bytes;
    std::atomic<Tick> ticks = 1;
    SectorModel model(image.size() / sector_bytes);
    Guest guest(image, model, [&] { return ++ticks; }, discards_read_as_zeros);
    guest.adopt();
    if (operation == HeldStorage::Operation::write) {
        // So that the one to be held finds its place and need not look for it.
        value_of(guest.write(0, block));
        value_of(guest.flush());
    }
    if (auto wrong = guest.verify(0, block)) return wrong;

    held.hold([operation](HeldStorage::Operation actual, HostOffset, std::uint64_t) { return actual == operation; });
    std::optional<std::string> late;
    std::thread slow([&] {
        if (operation == HeldStorage::Operation::read) {
            late = guest.verify(0, block);
        } else if (const auto wrote = guest.write(1, 1); !wrote) {
            late = wrote.error().message();
        }
    });
    const bool was_held = held.wait_until_held();
    std::atomic<bool> done = false;
    std::optional<std::string> failure;
    std::thread fast([&] {
        try {
            value_of(guest.discard(0, block));
            value_of(guest.flush());
            for (int round = 0; round < 3; ++round) {
                for (auto first = block; first + block <= guest.sectors(); first += block)
                    value_of(guest.write(first, block));
                value_of(guest.flush());
                if (round == 2) break;
                value_of(guest.discard(block, guest.sectors() - block));
                value_of(guest.flush());
                value_of(guest.flush());
            }
        } catch (const std::exception& e) {
            failure = e.what();
        }
        done = true;
    });
    // It may also wait until the slow one is done.
    for (int i = 0; i < 100 && !done; ++i) std::this_thread::sleep_for(std::chrono::milliseconds(10));
    held.release();
    slow.join();
    fast.join();
    if (!was_held) return "there was nothing to hold";
    if (failure) return failure;
    if (late) return late;
    if (auto wrong = guest.verify(0, guest.sectors())) return wrong;

    // What was let go of is handed out as if it were new.
    value_of(guest.discard(block, guest.sectors() - block));
    value_of(guest.flush());
    for (auto first = block; first + block <= guest.sectors(); first += block)
        value_of(guest.write(first + block / 2, 1));
    return guest.verify(0, guest.sectors());
} catch (const std::exception& e) {
    return e.what();
}

}  // namespace qcow::test
