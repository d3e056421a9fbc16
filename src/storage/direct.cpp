#include "storage/direct.h"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <new>
#include <vector>

#include "base/bits.h"
#include "base/buffers.h"
#include "base/range_locks.h"
#include "base/try.h"

namespace qcow {
namespace {

constexpr auto max_file_offset = static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max());
constexpr std::uint64_t everything = std::numeric_limits<std::uint64_t>::max();

/// Aligned memory that requests go through where the caller's does not do.
class Bounce {
public:
    Bounce(std::uint64_t bytes, std::uint64_t alignment)
        : alignment_(static_cast<std::align_val_t>(alignment)),
          bytes_(static_cast<std::byte*>(operator new(bytes, alignment_)), bytes) {}
    Bounce(const Bounce&) = delete;
    Bounce& operator=(const Bounce&) = delete;
    ~Bounce() { operator delete(bytes_.data(), alignment_); }

    [[nodiscard]] std::span<std::byte> bytes() const { return bytes_; }

private:
    std::align_val_t alignment_;
    std::span<std::byte> bytes_;
};

class DirectStorage final : public Storage {
public:
    DirectStorage(std::shared_ptr<Storage> file, DirectAlignment alignment)
        : file_(std::move(file)), alignment_(alignment) {}

    [[nodiscard]] const std::string& name() const override { return file_->name(); }
    [[nodiscard]] std::string identity() const override { return file_->identity(); }
    [[nodiscard]] Result<std::uint64_t> size() const override { return file_->size(); }
    [[nodiscard]] Result<std::uint64_t> allocated() const override { return file_->allocated(); }
    Result<void> flush() override { return file_->flush(); }
    [[nodiscard]] Result<Run> run(HostOffset at, std::uint64_t limit) const override { return file_->run(at, limit); }

    Result<std::size_t> read(HostOffset at, Buffers to) const override {
        if (is_aligned(at, to)) return file_->read(at, to);
        std::size_t done = 0;
        if (lies_within(at.value, to.size(), max_file_offset - alignment_.block)) done = TRY(read_blocks(at, to));
        fill_zeros(to.subspan(done));
        return done;
    }

    Result<void> write(HostOffset at, ConstBuffers from) override {
        // Past what files can be, the file says so.
        if (from.empty() || !lies_within(at.value, from.size(), max_file_offset - alignment_.block))
            return file_->write(at, from);
        const std::uint64_t end = at.value + from.size();
        if (qcow::is_aligned(end, alignment_.block)) {
            const RangeLocks::Guard guard(held_, block_begin(at.value), end);
            return write_blocks(at, from);
        }
        // Its last block may make the file longer than it should be for a moment, and nobody may write there then: not
        // even in front of an end that only seems to be one. Thus also where the file ends with that block.
        const bool past_end = block_end(end) >= TRY(size());
        const RangeLocks::Guard guard(held_, block_begin(at.value), past_end ? everything : block_end(end));
        if (!past_end) return write_blocks(at, from);
        const std::uint64_t size = TRY(this->size());
        auto written = write_blocks(at, from);
        if (block_end(end) > size) TRY_VOID(file_->resize(std::max(size, end)));
        return written;
    }

    Result<void> write_zeroes(HostOffset at, std::uint64_t length) override {
        const std::uint64_t size = TRY(this->size());
        if (at.value >= size) return file_->write_zeroes(at, length);
        const HostOffset end = at + std::min(length, size - at.value);
        const HostOffset first{block_end(at.value)};
        const HostOffset last{block_begin(end.value)};
        if (first >= last) return write(at, std::vector<std::byte>(end - at));
        TRY_VOID(write(at, std::vector<std::byte>(first - at)));
        {
            const RangeLocks::Guard guard(held_, first.value, last.value);
            TRY_VOID(file_->write_zeroes(first, last - first));
        }
        return write(last, std::vector<std::byte>(end - last));
    }

    Result<void> allocate(HostOffset at, std::uint64_t length) override {
        const RangeLocks::Guard guard(held_, block_begin(at.value), block_end(at.value + length));
        return file_->allocate(at, length);
    }

    Result<void> resize(std::uint64_t size) override {
        const RangeLocks::Guard guard(held_, 0, everything);
        return file_->resize(size);
    }

    Result<std::uint64_t> copy_from(const Storage& source, HostOffset from, HostOffset to,
                                    std::uint64_t length) override {
        const RangeLocks::Guard guard(held_, block_begin(to.value), block_end(to.value + length));
        return file_->copy_from(source, from, to, length);
    }

private:
    /// Enough for the device to be busy.
    static constexpr std::uint64_t bounce_bytes = MiB;

    [[nodiscard]] std::uint64_t block_begin(std::uint64_t at) const { return align_down(at, alignment_.block); }
    [[nodiscard]] std::uint64_t block_end(std::uint64_t end) const {
        return divide_up(end, alignment_.block) * alignment_.block;
    }

    template <class Byte>
    [[nodiscard]] bool is_aligned(HostOffset at, BasicBuffers<Byte> memory) const {
        std::uint64_t lengths = 0;
        std::uintptr_t places = 0;
        for (const auto piece : memory) {
            lengths |= piece.size();
            places |= reinterpret_cast<std::uintptr_t>(piece.data());
        }
        return qcow::is_aligned(at.value | lengths, alignment_.block) && qcow::is_aligned(places, alignment_.memory);
    }

    [[nodiscard]] Bounce bounce_for(HostOffset at, std::uint64_t length) const {
        return {std::min(block_end(at.value + length) - block_begin(at.value), bounce_bytes), alignment_.memory};
    }

    [[nodiscard]] Result<std::size_t> read_blocks(HostOffset at, Buffers to) const {
        const Bounce bounce = bounce_for(at, to.size());
        std::size_t done = 0;
        while (done < to.size()) {
            const HostOffset begin{block_begin(at.value + done)};
            const std::size_t skipped = at + done - begin;
            const auto part = to.subspan(done, std::min(to.size() - done, bounce.bytes().size() - skipped));
            const auto blocks = bounce.bytes().first(block_end(skipped + part.size()));
            const std::size_t found = TRY(file_->read(begin, blocks));
            const std::size_t wanted = std::min(part.size(), found - std::min(found, skipped));
            scatter(blocks.subspan(skipped, wanted), part);
            done += wanted;
            if (wanted < part.size()) break;
        }
        return done;
    }

    /// The caller holds all blocks that are touched.
    Result<void> write_blocks(HostOffset at, ConstBuffers from) {
        if (is_aligned(at, from)) return file_->write(at, from);
        const Bounce bounce = bounce_for(at, from.size());
        while (!from.empty()) {
            const HostOffset begin{block_begin(at.value)};
            const std::size_t skipped = at - begin;
            const auto part = from.first(std::min(from.size(), bounce.bytes().size() - skipped));
            const auto blocks = bounce.bytes().first(block_end(skipped + part.size()));
            const bool whole_end = skipped + part.size() == blocks.size();
            if (skipped != 0) TRY(file_->read(begin, blocks.first(alignment_.block)));
            if (!whole_end && (skipped == 0 || blocks.size() > alignment_.block)) {
                TRY(file_->read(begin + (blocks.size() - alignment_.block), blocks.last(alignment_.block)));
            }
            gather(part, blocks.subspan(skipped));
            TRY_VOID(file_->write(begin, blocks));
            at += part.size();
            from = from.subspan(part.size());
        }
        return {};
    }

    std::shared_ptr<Storage> file_;
    DirectAlignment alignment_;
    RangeLocks held_;  // bytes, in whole blocks, that are being written
};

}  // namespace

std::shared_ptr<Storage> direct_storage(std::shared_ptr<Storage> file, DirectAlignment alignment) {
    return std::make_shared<DirectStorage>(std::move(file), alignment);
}

}  // namespace qcow
