#pragma once
// A copy-on-write image format as small as can be, and every mistake that the suites are there to catch: a suite that
// passes without a mistake and fails with each of them is one that can be believed.

#include <fmt/format.h>

#include <mutex>
#include <thread>
#include <vector>

#include "support/bytes.h"
#include "support/disks.h"

namespace qcow::test {

enum class Mistake : std::uint8_t {
    none,
    flush_skipped,        ///< flush() does nothing
    mapping_first,        ///< a block is mapped before its count is durable
    data_last,            ///< a block of which somebody else's bytes remain is mapped before its data are durable
    reuse_before_commit,  ///< a discarded block is handed out before it is durable that nothing maps it
    punch_before_commit,  ///< and zeroed
    reuse_while_in_use,   ///< or while a request is still reading or writing it
    lost_update,          ///< two requests that fill parts of one new block at once: one of them is lost
    error_swallowed,      ///< a flush that fails succeeds
    flush_tried_again,    ///< what a flush did not make durable is taken for durable after the next one
};

inline std::string mistake_name(Mistake mistake) {
    static constexpr const char* names[] = {"None",
                                            "FlushSkipped",
                                            "MappingFirst",
                                            "DataLast",
                                            "ReuseBeforeCommit",
                                            "PunchBeforeCommit",
                                            "ReuseWhileInUse",
                                            "LostUpdate"};
    return names[static_cast<std::size_t>(mistake)];
}

/// Block 0 holds the mapping (a byte a guest block: the host block), block 1 the counts (a byte a host block), then
/// come the data. As small as that, it keeps both in memory. Whole blocks are written to a new place, parts in place.
class ToyImage final : public Image {
public:
    static constexpr std::uint64_t block = 4096;
    static constexpr std::uint64_t guest_blocks = 64;
    static constexpr std::uint64_t host_blocks = 200;
    static constexpr std::uint64_t first_data = 2;

    static void create(Storage& storage) {
        value_of(storage.resize(first_data * block));
        value_of(storage.flush());
    }

    ToyImage(std::shared_ptr<Storage> storage, Mistake mistake)
        : storage_(std::move(storage)),
          mistake_(mistake),
          map_(guest_blocks),
          counts_(host_blocks),
          users_(host_blocks) {
        value_of(storage_->read({0}, std::as_writable_bytes(std::span(map_))));
        value_of(storage_->read({block}, std::as_writable_bytes(std::span(counts_))));
        // What nothing maps is free, whatever the counts say.
        for (std::size_t i = 0; i < host_blocks; ++i)
            if (counts_[i] != 0 && std::ranges::find(map_, i) == map_.end()) counts_[i] = 0;
    }

    [[nodiscard]] std::uint64_t size() const override { return guest_blocks * block; }
    [[nodiscard]] std::uint64_t block_size() const override { return block; }
    [[nodiscard]] Format format() const override { return Format::qcow; }  // neither of the known ones
    [[nodiscard]] std::vector<std::string> files() const override { return {}; }
    [[nodiscard]] Result<ImageInfo> do_info() const override { return ImageInfo{}; }
    Result<void> do_close() override { return flush(); }

    Result<Extent> do_extent(GuestOffset at, std::uint64_t limit) override {
        const std::lock_guard lock(mutex_);
        const auto host = map_[at.value / block];
        Extent extent{at, std::min(limit, block - at.value % block)};
        if (host == 0) return extent;
        extent.kind = Extent::Kind::data;
        extent.host = HostOffset{host * block + at.value % block};
        extent.storage = storage_.get();
        return extent;
    }

    Result<void> do_read(GuestOffset at, std::span<std::byte> to) override {
        return each_block(at, to.size(),
                          [&](std::uint64_t guest, std::uint64_t within, std::uint64_t done, std::uint64_t n) {
                              const auto part = to.subspan(done, n);
                              const auto host = use(guest);
                              if (host == 0) {
                                  std::ranges::fill(part, std::byte{0});
                                  return Result<void>();
                              }
                              const auto read = storage_->read({host * block + within}, part);
                              leave(host);
                              return read ? Result<void>() : std::unexpected(read.error());
                          });
    }

    Result<void> do_write(GuestOffset at, std::span<const std::byte> from) override {
        if (auto usable = verify_usable(); !usable) return usable;
        return each_block(at, from.size(),
                          [&](std::uint64_t guest, std::uint64_t within, std::uint64_t done, std::uint64_t n) {
                              const auto part = from.subspan(done, n);
                              auto host = n == block ? 0 : use(guest);
                              if (host == 0) {
                                  if (mistake_ == Mistake::lost_update)
                                      return fill_new_block_alone(guest, within, part);
                                  const std::lock_guard allocating(allocating_);
                                  if (n != block) host = use(guest);
                                  if (host == 0) return fill_new_block(guest, within, part);
                              }
                              auto wrote = storage_->write({host * block + within}, part);
                              leave(host);
                              return wrote;
                          });
    }

    Result<void> do_write_zeroes(GuestOffset at, std::uint64_t length, Zeroes) override {
        return write(at, Bytes(length));
    }

    Result<void> do_discard(GuestOffset at, std::uint64_t length) override {
        if (auto usable = verify_usable(); !usable) return usable;
        const auto first = (at.value + block - 1) / block;
        for (auto guest = first; (guest + 1) * block <= at.value + length; ++guest) {
            const std::lock_guard lock(mutex_);
            if (auto mapped = map(guest, 0); !mapped) return mapped;
        }
        return {};
    }

    Result<void> do_flush() override {
        if (mistake_ == Mistake::flush_skipped) return {};
        if (auto usable = verify_usable(); !usable) return usable;
        const std::lock_guard lock(mutex_);
        if (auto flushed = flush_storage(); !flushed)
            return mistake_ == Mistake::error_swallowed ? Result<void>() : flushed;
        const auto dropped = std::exchange(dropped_, {});
        for (const auto host : dropped) {
            if (mistake_ != Mistake::reuse_while_in_use && users_[host] != 0) {
                dropped_.push_back(host);  // perhaps with the next flush
                continue;
            }
            counts_[host] = 0;
            if (auto stored = store_count(host); !stored) return stored;
        }
        return {};
    }

    Result<CheckReport> do_check(const CheckOptions&) override {
        CheckReport report;
        Bytes stored(host_blocks);
        value_of(storage_->read({block}, stored));
        std::vector<unsigned> references(host_blocks);
        for (const auto host : map_) {
            if (host == 0) continue;
            if (host < first_data || host >= host_blocks ||
                ++references[host] > std::to_integer<unsigned>(stored[host])) {
                ++report.corruptions;
                report.findings.push_back({CheckFinding::Severity::corruption, fmt::format("block {}", host),
                                           "is used more often than it is counted"});
            }
        }
        return report;
    }

    [[nodiscard]] Result<void> verify_writable() const override { return {}; }

private:
    template <class Visit>
    Result<void> each_block(GuestOffset at, std::uint64_t length, const Visit& visit) {
        for (std::uint64_t done = 0; done < length;) {
            const auto within = (at.value + done) % block;
            const auto n = std::min(block - within, length - done);
            if (auto visited = visit((at.value + done) / block, within, done, n); !visited) return visited;
            done += n;
        }
        return {};
    }

    /// Where a guest block is; until leave() it is not given to anybody else.
    std::uint64_t use(std::uint64_t guest) {
        const std::lock_guard lock(mutex_);
        const auto host = map_[guest];
        if (host != 0) ++users_[host];
        return host;
    }

    void leave(std::uint64_t host) {
        const std::lock_guard lock(mutex_);
        --users_[host];
    }

    Result<void> fill_new_block_alone(std::uint64_t guest, std::uint64_t within, std::span<const std::byte> part) {
        std::this_thread::yield();
        const std::lock_guard allocating(allocating_);
        return fill_new_block(guest, within, part);
    }

    Result<void> fill_new_block(std::uint64_t guest, std::uint64_t within, std::span<const std::byte> part) {
        std::uint64_t host = first_data;
        {
            const std::lock_guard lock(mutex_);
            while (host < host_blocks && counts_[host] != 0) ++host;
            if (host == host_blocks) return std::unexpected(Error{Errc::no_space, "toy", "no block is free"});
            counts_[host] = 1;
            if (auto stored = store_count(host); !stored) return stored;
        }
        Bytes bytes(block);
        std::ranges::copy(part, bytes.begin() + static_cast<std::ptrdiff_t>(within));
        if (mistake_ == Mistake::data_last || mistake_ == Mistake::mapping_first) {
            if (mistake_ == Mistake::data_last) {
                if (auto flushed = flush_storage(); !flushed) return flushed;
            }
            if (auto wrote = storage_->write({host * block}, bytes); !wrote) return wrote;
        } else {
            if (auto wrote = storage_->write({host * block}, bytes); !wrote) return wrote;
            if (auto flushed = flush_storage(); !flushed) return flushed;
        }
        const std::lock_guard lock(mutex_);
        return map(guest, host);
    }

    /// Lets a guest block be elsewhere, or nowhere. The place where it was is free only later.
    Result<void> map(std::uint64_t guest, std::uint64_t host) {
        const auto before = std::exchange(map_[guest], static_cast<std::uint8_t>(host));
        if (auto stored = store({guest}, std::span(map_).subspan(guest, 1)); !stored) return stored;
        if (before == 0) return {};
        if (mistake_ == Mistake::reuse_before_commit) {
            counts_[before] = 0;
            return {};
        }
        dropped_.push_back(before);
        return mistake_ == Mistake::punch_before_commit ? storage_->write_zeroes({before * block}, block)
                                                        : Result<void>();
    }

    Result<void> store_count(std::uint64_t host) { return store({block + host}, std::span(counts_).subspan(host, 1)); }

    Result<void> store(HostOffset at, std::span<const std::uint8_t> bytes) {
        return or_unusable(storage_->write(at, std::as_bytes(bytes)));
    }

    Result<void> flush_storage() {
        auto flushed = storage_->flush();
        return mistake_ == Mistake::flush_tried_again ? flushed : or_unusable(std::move(flushed));
    }

    /// Once it is not known any more what the file holds, nothing can be promised: all that follows fails.
    Result<void> or_unusable(Result<void> result) {
        const std::lock_guard lock(usable_mutex_);
        if (!result && usable_) usable_ = result;
        return result;
    }

    Result<void> verify_usable() {
        const std::lock_guard lock(usable_mutex_);
        return mistake_ == Mistake::error_swallowed ? Result<void>() : usable_;
    }

    std::shared_ptr<Storage> storage_;
    Mistake mistake_;
    std::mutex mutex_;       // all of the below
    std::mutex allocating_;  // held while a block is filled for the first time; before the other one
    std::vector<std::uint8_t> map_;
    std::vector<std::uint8_t> counts_;
    std::vector<unsigned> users_;
    std::vector<std::uint64_t> dropped_;
    std::mutex usable_mutex_;  // the last one
    Result<void> usable_;
};

}  // namespace qcow::test
