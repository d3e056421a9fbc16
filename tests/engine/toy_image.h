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

std::string mistake_name(Mistake mistake);

/// Block 0 holds the mapping (a byte a guest block: the host block), block 1 the counts (a byte a host block), then
/// come the data. As small as that, it keeps both in memory. Whole blocks are written to a new place, parts in place.
class ToyImage final : public Image {
public:
    static constexpr std::uint64_t block = 4096;
    static constexpr std::uint64_t guest_blocks = 64;
    static constexpr std::uint64_t host_blocks = 200;
    static constexpr std::uint64_t first_data = 2;

    static void create(Storage& storage);

    ToyImage(std::shared_ptr<Storage> storage, Mistake mistake);

    [[nodiscard]] std::uint64_t size() const override { return guest_blocks * block; }
    [[nodiscard]] std::uint64_t block_size() const override { return block; }
    [[nodiscard]] Format format() const override { return Format::qcow; }  // neither of the known ones
    [[nodiscard]] std::vector<std::string> files() const override { return {}; }
    [[nodiscard]] Result<ImageInfo> do_info() const override { return ImageInfo{}; }
    Result<void> do_close() override { return flush(); }

    Result<Extent> do_extent(GuestOffset at, std::uint64_t limit) override;

    Result<void> do_read(GuestOffset at, Buffers to) override;

    Result<void> do_write(GuestOffset at, ConstBuffers from) override;

    Result<void> do_write_zeroes(GuestOffset at, std::uint64_t length, Zeroes) override;

    Result<void> do_discard(GuestOffset at, std::uint64_t length) override;

    Result<void> do_flush() override;

    Result<CheckReport> do_check(const CheckOptions&) override;

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
    std::uint64_t use(std::uint64_t guest);

    void leave(std::uint64_t host);

    Result<void> fill_new_block_alone(std::uint64_t guest, std::uint64_t within, std::span<const std::byte> part);

    Result<void> fill_new_block(std::uint64_t guest, std::uint64_t within, std::span<const std::byte> part);

    /// Lets a guest block be elsewhere, or nowhere. The place where it was is free only later.
    Result<void> map(std::uint64_t guest, std::uint64_t host);

    Result<void> store_count(std::uint64_t host) { return store({block + host}, std::span(counts_).subspan(host, 1)); }

    Result<void> store(HostOffset at, std::span<const std::uint8_t> bytes);

    Result<void> flush_storage();

    /// Once it is not known any more what the file holds, nothing can be promised: all that follows fails.
    Result<void> or_unusable(Result<void> result);

    Result<void> verify_usable();

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
