#include "qcow/compare.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <map>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "base/bits.h"
#include "base/going_on.h"
#include "base/page_memory.h"
#include "disk/padded.h"
#include "operation/in_order.h"
#include "operation/runs.h"
#include "qcow/storage.h"

namespace qcow {
namespace {

/// Small enough that both sides stay in the processor's cache.
constexpr std::uint64_t min_compared_bytes = 256 * KiB;

/// A piece that could not be read is read again in parts of this length.
constexpr std::uint64_t retry_bytes = 4 * KiB;

using Bytes = std::span<const std::byte>;

/// One of the two disks.
struct Side {
    std::shared_ptr<Disk> disk;  // in whole sectors
    Runs runs;

    explicit Side(Disk& from) : disk(padded(from, rounded_size(from.size()))), runs(*disk) {}

    /// The run at `at`. Behind its end, a disk reads as zeros.
    Result<Run> run_at(GuestOffset at, std::uint64_t limit) {
        if (at.value < disk->size()) return runs.at(at);
        return Run{{.start = at, .length = limit}, true};
    }
};

/// What was found in a piece.
struct Findings {
    std::uint64_t length = 0;  // bytes of the piece
    std::vector<Difference> differences = {};
    std::uint64_t different_bytes = 0;
    std::optional<Error> error = {};  // behind all of `differences`
    CompareStep failed_in = CompareStep::reading;
};

/// Appends `next` to `difference` if both are of one kind and lie in the same sector or in neighbouring ones. Returns
/// whether it did.
bool join(Difference& difference, const Difference& next) {
    const GuestOffset last = difference.bytes.start + (difference.bytes.length - 1);
    if (difference.kind != next.kind || last.value / sector_bytes + 1 < next.bytes.start.value / sector_bytes)
        return false;
    difference.bytes.length = next.bytes.start + next.bytes.length - difference.bytes.start;
    return true;
}

/// Compares two runs of the same length. An empty `b` stands for zeros.
void compare_bytes(GuestOffset at, Bytes a, Bytes b, Findings& findings) {
    if (b.empty() ? is_zero(a) : std::memcmp(a.data(), b.data(), a.size()) == 0) return;
    static constexpr std::array<std::byte, sector_bytes> zeros = {};
    auto& differences = findings.differences;
    for (std::size_t begin = 0; begin < a.size(); begin += sector_bytes) {
        const auto left = a.subspan(begin, std::min<std::size_t>(sector_bytes, a.size() - begin));
        const auto right = b.empty() ? Bytes(zeros) : b.subspan(begin);
        if (std::memcmp(left.data(), right.data(), left.size()) == 0) continue;
        std::size_t first = left.size();
        std::size_t last = 0;
        for (std::size_t i = 0; i < left.size(); ++i) {
            if (left[i] == right[i]) continue;
            first = std::min(first, i);
            last = i;
            ++findings.different_bytes;
        }
        const Difference found{Difference::Kind::contents, {at + (begin + first), last + 1 - first}};
        if (differences.empty() || !join(differences.back(), found)) differences.push_back(found);
    }
}

/// Hands out what has to be read, in guest order, and collects what was found, in the same order.
class Comparer {
public:
    struct Piece {
        GuestRange range;
        // A disk that is not read holds zeros. If neither is read, both hold the same bytes.
        bool read_a = false;
        bool read_b = false;
        bool allocation_differs = false;
        std::optional<Error> error = {};  // instead of the above
    };

    /// What a worker reads into.
    struct Memory {
        PageMemory a;
        PageMemory b;
    };

    Comparer(Disk& a, Disk& b, const CompareOptions& options)
        : a_(a),
          b_(b),
          options_(options),
          common_size_(std::min(a_.disk->size(), b_.disk->size())),
          size_(std::max(a_.disk->size(), b_.disk->size())),
          piece_bytes_(std::max({min_compared_bytes, a.block_size(), b.block_size()})) {}

    Result<Comparison> run() {
        Comparison& result = comparison_;
        result.size_a = a_.disk->size();
        result.size_b = b_.disk->size();
        const bool sizes_fit = result.size_a == result.size_b || !options_.strict;
        if (sizes_fit || options_.visit) {
            // What cannot be read has no contents, not even where nothing is stored.
            TRY_VOID(a_.disk->read({0}, {}));
            TRY_VOID(b_.disk->read({0}, {}));
            TRY_VOID(run_in_order(options_.workers == 0 ? default_workers() : options_.workers, *this));
            for (const auto& pending : pending_)
                if (pending) TRY_VOID(options_.visit(*pending));
        }
        result.identical = sizes_fit && !result.first;
        return result;
    }

    Result<std::optional<Piece>> next() {
        Piece piece = {.range = {cursor_}};
        auto& length = piece.range.length;
        while (cursor_.value < size_) {
            TRY_VOID(verify_goes_on(options_.control));
            auto found = look(cursor_);
            if (!found && length != 0) break;  // first what lies before it
            if (!found) {
                piece.error = std::move(found).error();
                cursor_ = {size_};
                return piece;
            }
            const bool same = !found->read_a && !found->read_b && !found->allocation_differs;
            if (length != 0 && (same || found->read_a != piece.read_a || found->read_b != piece.read_b ||
                                found->allocation_differs != piece.allocation_differs)) {
                break;
            }
            if (same) {
                cursor_ += found->range.length;
                piece.range.start = cursor_;
                advance(found->range.length);
                continue;
            }
            const std::uint64_t room = piece_bytes_ - cursor_.value % piece_bytes_;
            const bool is_read = found->read_a || found->read_b;
            const std::uint64_t taken = is_read ? std::min(found->range.length, room) : found->range.length;
            found->range = {piece.range.start, length + taken};
            piece = *std::move(found);
            cursor_ += taken;
            if (taken == room || !is_read) break;
        }
        if (length == 0) return std::nullopt;
        return piece;
    }

    Findings perform(const Piece& piece, Memory& memory) const {
        Findings findings{.length = piece.range.length};
        if (piece.error) {
            findings.error = piece.error;
            findings.failed_in = CompareStep::mapping;
            return findings;
        }
        if (piece.allocation_differs) {
            findings.differences.push_back({Difference::Kind::allocation, piece.range});
            if (!options_.visit) return findings;
        }
        if (!piece.read_a && !piece.read_b) return findings;
        if (compare_contents(piece, piece.range, memory, findings)) return findings;
        // Differences before the bytes that cannot be read come first.
        for (std::uint64_t done = 0; done < piece.range.length; done += retry_bytes) {
            const auto part = std::min(retry_bytes, piece.range.length - done);
            auto read = compare_contents(piece, {piece.range.start + done, part}, memory, findings);
            if (read) continue;
            findings.error = std::move(read).error();
            return findings;
        }
        return findings;  // now it could be read
    }

    Result<bool> settle(Findings findings) {
        for (const auto& difference : findings.differences) {
            if (!comparison_.first) comparison_.first = difference;
            if (!options_.visit) return false;
            TRY_VOID(visit(difference));
        }
        if (findings.error) {
            if (options_.failed_in != nullptr) *options_.failed_in = findings.failed_in;
            return std::unexpected(*std::move(findings.error));
        }
        comparison_.different_bytes += findings.different_bytes;
        advance(findings.length);
        return true;
    }

private:
    /// The piece that begins at `at` and goes on as far as both disks have one run each.
    Result<Piece> look(GuestOffset at) {
        const auto a = TRY(a_.run_at(at, size_ - at.value));
        const auto b = TRY(b_.run_at(at, size_ - at.value));
        Piece piece;
        piece.range = {at, std::min(a.extent.length, b.extent.length)};
        const bool same_place = !a.zeros && !b.zeros && TRY(lie_in_same_place(a.extent, b.extent));
        piece.read_a = !a.zeros && !same_place;
        piece.read_b = !b.zeros && !same_place;
        piece.allocation_differs =
            options_.strict && at.value < common_size_ &&
            (a.extent.kind != b.extent.kind || a.extent.host.has_value() != b.extent.host.has_value());
        return piece;
    }

    Result<bool> lie_in_same_place(const Extent& a, const Extent& b) {
        if (!a.host || a.host != b.host) return false;
        const auto [known, is_new] = same_file_.try_emplace({a.storage, b.storage}, false);
        if (is_new) known->second = a.storage->identity() == b.storage->identity();
        return known->second ? lies_in_file(a) : false;
    }

    Result<void> compare_contents(const Piece& piece, const GuestRange& range, Memory& memory,
                                  Findings& findings) const {
        const auto a = piece.read_a ? TRY(read(*a_.disk, range, memory.a)) : Bytes();
        const auto b = piece.read_b ? TRY(read(*b_.disk, range, memory.b)) : Bytes();
        if (piece.read_a) {
            compare_bytes(range.start, a, b, findings);
        } else {
            compare_bytes(range.start, b, a, findings);
        }
        return {};
    }

    Result<Bytes> read(Disk& disk, const GuestRange& range, PageMemory& memory) const {
        if (!memory) memory = PageMemory(piece_bytes_);
        const std::span<std::byte> bytes(memory.data(), range.length);
        TRY_VOID(disk.read(range.start, bytes));
        return bytes;
    }

    /// Visits the difference as soon as it is known where it ends.
    Result<void> visit(const Difference& difference) {
        auto& pending = pending_[difference.kind == Difference::Kind::allocation ? 1 : 0];
        if (pending && join(*pending, difference)) return {};
        const auto done = std::exchange(pending, difference);
        return done ? options_.visit(*done) : Result<void>();
    }

    void advance(std::uint64_t bytes) {
        done_ += bytes;
        if (options_.control.progress) options_.control.progress(done_, size_);
    }

    Side a_;
    Side b_;
    const CompareOptions& options_;
    const std::uint64_t common_size_;
    const std::uint64_t size_;  // of the larger disk
    const std::uint64_t piece_bytes_;

    GuestOffset cursor_;
    std::map<std::pair<const Storage*, const Storage*>, bool> same_file_;
    Comparison comparison_;
    std::array<std::optional<Difference>, 2> pending_;  // the last of each kind: it may go on
    std::uint64_t done_ = 0;
};

}  // namespace

Result<Comparison> compare_disks(Disk& a, Disk& b, const CompareOptions& options) {
    return within_memory([&] {
        if (options.failed_in != nullptr) *options.failed_in = CompareStep::reading;
        return Comparer(a, b, options).run();
    });
}

Result<CompareResult> compare(const ImageSpec& a, const ImageSpec& b, const CompareOptions& options) {
    return within_memory([&]() -> Result<CompareResult> {
        if (options.failed_in != nullptr) *options.failed_in = CompareStep::opening;
        const auto image_a = TRY(open_image(a, options.control.warn));
        const auto image_b = TRY(open_image(b, options.control.warn));
        CompareResult result{image_a->format(), image_b->format(), {}};
        result.comparison = TRY(compare_disks(*image_a, *image_b, options));
        return result;
    });
}

}  // namespace qcow
