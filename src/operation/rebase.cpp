#include "operation/rebase.h"

#include <fmt/format.h>

#include <algorithm>
#include <atomic>

#include "base/bits.h"
#include "base/within_memory.h"
#include "operation/new_image.h"
#include "operation/pieces.h"
#include "qcow/files_in_use.h"
#include "qcow/text.h"
#include "qcow2/qcow2_image.h"

namespace qcow {
namespace {

using enum FilesInUse::Use;

/// Copies into an image what it takes from the layers below and what its new backing file has otherwise.
class RebaseCopy {
public:
    /// `new_backing`: null for none. `marks_zeros`: whether write_zeroes hides what a backing file has.
    RebaseCopy(const RebaseJob& job, const JobControl& control, Image& image, Disk* new_backing, bool marks_zeros)
        : job_(job), control_(control), image_(image), new_backing_(new_backing), marks_zeros_(marks_zeros) {}

    /// Returns the bytes that were copied.
    Result<std::uint64_t> run() {
        TRY_VOID(run_in_pieces<Memory>(
            image_.size(), job_.workers, control_,
            [&](GuestRange piece, Memory& memory) { return copy_piece(piece, memory); }));
        return copied_;
    }

private:
    struct Memory {
        std::vector<std::byte> old = std::vector<std::byte>(piece_bytes);
        std::vector<std::byte> now = std::vector<std::byte>(piece_bytes);
    };

    Result<void> copy_piece(GuestRange piece, Memory& memory) {
        for (GuestOffset at = piece.start, end = at + piece.length; at < end;) {
            const auto old = TRY(image_.extent(at, end - at));
            const bool held = old.depth == 0 && old.kind != Extent::Kind::unallocated;
            const auto now = held ? old : TRY(new_extent(at, old.length));
            const auto part = std::min(old.length, now.length);
            if (!held && !is_same(old, now)) TRY_VOID(copy_part(at, part, memory));
            at += part;
        }
        return {};
    }

    /// What the new backing file has from `at` on.
    Result<Extent> new_extent(GuestOffset at, std::uint64_t limit) {
        if (new_backing_ == nullptr || at.value >= new_backing_->size()) return Extent{.start = at, .length = limit};
        return new_backing_->extent(at, std::min(limit, new_backing_->size() - at.value));
    }

    /// Whether two extents that begin at the same guest offset are known to hold the same, without a look at it.
    static bool is_same(const Extent& old, const Extent& now) {
        const bool old_data = old.kind == Extent::Kind::data;
        const bool new_data = now.kind == Extent::Kind::data;
        if (!old_data && !new_data) return true;
        return old_data && new_data && old.host && old.host == now.host &&
               old.storage->identity() == now.storage->identity();
    }

    Result<void> copy_part(GuestOffset at, std::uint64_t length, Memory& memory) {
        const auto old = std::span(memory.old).first(length);
        TRY_VOID(image_.read(at, old));
        TRY_VOID(read_new(at, std::span(memory.now).first(length)));
        // Blocks that differ, one run after the other.
        for (std::uint64_t begin = 0; begin < length;) {
            if (!differs(memory, at, begin, length)) {
                begin = block_end(at, begin, length);
                continue;
            }
            std::uint64_t end = block_end(at, begin, length);
            while (end < length && differs(memory, at, end, length)) end = block_end(at, end, length);
            TRY_VOID(copy_up(at + begin, old.subspan(begin, end - begin)));
            begin = end;
        }
        return {};
    }

    [[nodiscard]] std::uint64_t block_end(GuestOffset at, std::uint64_t begin, std::uint64_t length) const {
        const std::uint64_t block = image_.block_size();
        return std::min(length, begin + block - (at.value + begin) % block);
    }

    [[nodiscard]] bool differs(const Memory& memory, GuestOffset at, std::uint64_t begin, std::uint64_t length) const {
        const auto bytes = block_end(at, begin, length) - begin;
        return !std::ranges::equal(std::span(memory.old).subspan(begin, bytes),
                                   std::span(memory.now).subspan(begin, bytes));
    }

    Result<void> read_new(GuestOffset at, std::span<std::byte> to) {
        const std::uint64_t size = new_backing_ == nullptr ? 0 : new_backing_->size();
        const auto there = std::min<std::uint64_t>(to.size(), size - std::min(size, at.value));
        std::ranges::fill(to.subspan(there), std::byte{0});
        return there == 0 ? Result<void>() : new_backing_->read(at, to.first(there));
    }

    Result<void> copy_up(GuestOffset at, std::span<const std::byte> from) {
        copied_ += from.size();
        return qcow2::copy_up(image_, at, from, stored(at, from), job_.level);
    }

    [[nodiscard]] qcow2::Stored stored(GuestOffset at, std::span<const std::byte> from) const {
        if (marks_zeros_ && is_zero(from)) return qcow2::Stored::zeros;
        const std::uint64_t block = image_.block_size();
        const bool whole =
            at.value % block == 0 && (from.size() % block == 0 || at.value + from.size() == image_.size());
        return job_.compress && whole ? qcow2::Stored::compressed : qcow2::Stored::plain;
    }

    const RebaseJob& job_;
    const JobControl& control_;
    Image& image_;
    Disk* const new_backing_;
    const bool marks_zeros_;
    std::atomic<std::uint64_t> copied_ = 0;
};

Result<RebaseResult> run(const RebaseJob& job, const JobControl& control) {
    Warnings warnings(control.warn);
    auto spec = job.image;
    if (!spec.write) spec.write.emplace();
    spec.write->detect_zeroes = DetectZeroes::off;  // zeros in front of the new backing file are data
    spec.follow = spec.follow && !job.unsafe;

    NewImage names;
    names.path = spec.location.path;
    names.untrusted = spec.untrusted;
    names.keys = spec.keys;
    names.options.backing_name = job.backing;
    if (job.backing_format) names.options.backing_format = format_name(*job.backing_format);
    names = TRY(with_recorded_names(std::move(names)));
    const auto& name = names.options.backing_name;

    FilesInUse in_use;
    // What is recorded now does not matter to a new name. It may even be a loop.
    TRY_VOID(job.unsafe ? add_alone(in_use, written, spec, "the image")
                        : in_use.add_unopened(written, spec, "the image"));
    std::shared_ptr<Image> new_backing;
    std::optional<Format> format;
    if (!name.empty()) {
        const auto backing_spec = TRY(backing_of(names));
        format = backing_spec.location.format;
        TRY_VOID(in_use.add_unopened(read, backing_spec, "its new backing file"));
        if (!job.unsafe) {
            auto opened = open_image(backing_spec, warnings.to());
            // One that the image could not be read through, such as an encrypted one, shows before anything changes.
            if (opened) {
                if (auto readable = (*opened)->read({0}, std::span<std::byte>()); !readable)
                    opened = std::unexpected(std::move(readable).error());
            }
            if (!opened) {
                auto error = std::move(opened).error().in("new backing file");
                if (error.code == Errc::not_found) error.what += "; -u records a name without looking for the file";
                return std::unexpected(std::move(error));
            }
            TRY_VOID(in_use.add(read, **opened, "its new backing file"));
            new_backing = *std::move(opened);
        }
    }
    const auto image = TRY(open_image(spec, warnings.to()));
    if (image->format() != Format::qcow2) {
        return fail(Errc::unsupported, spec.location.path, "only a qcow2 image has a backing file that can be changed");
    }
    RebaseResult result;
    result.bytes = image->size();
    const auto info = TRY(image->info());
    if (!info.snapshots.empty()) {
        warnings.add(
            {Warning::Kind::odd_image,
             fmt::format("{}: its internal snapshots ({}) take from the new backing file what they do not hold",
                         printable(spec.location.path), info.snapshots.size())});
    }
    result.copied_bytes = TRY(rebase_image(*image, {new_backing.get(), name, format}, job, control));
    result.warnings = warnings.take();
    return result;
}

}  // namespace

Result<std::uint64_t> rebase_image(Image& image, const NewBacking& backing, const RebaseJob& job,
                                   const JobControl& control) {
    std::uint64_t copied = 0;
    if (!job.unsafe) {
        // Version 2 cannot mark zeros. Where the old backing file has none either, it would leave a hole.
        const bool marks_zeros = TRY(image.info()).version >= 3;
        copied = TRY(RebaseCopy(job, control, image, backing.disk, marks_zeros).run());
    }
    TRY_VOID(image.change_backing(backing.name, backing.format));
    TRY_VOID(image.close());
    return copied;
}

Result<RebaseResult> rebase(const RebaseJob& job, const JobControl& control) {
    return within_memory([&] { return run(job, control); });
}

}  // namespace qcow
