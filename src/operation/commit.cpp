#include "operation/commit.h"

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <filesystem>
#include <optional>
#include <system_error>

#include "base/bits.h"
#include "base/within_memory.h"
#include "disk/layer.h"
#include "format/file_name.h"
#include "image/gate.h"
#include "operation/new_image.h"
#include "operation/pieces.h"
#include "qcow/files_in_use.h"
#include "qcow/text.h"

namespace qcow {
namespace {

namespace fs = std::filesystem;
using enum FilesInUse::Use;

/// Writes into the base what the layers above it hold.
class CommitCopy {
public:
    /// `top` reads the layers above the base, and nothing below them. `layers`: how many these are.
    CommitCopy(const CommitJob& job, const JobControl& control, Image& top, std::size_t layers, Image& base,
               bool compresses)
        : job_(job), control_(control), top_(top), layers_(layers), base_(base), compresses_(compresses) {}

    /// Returns the bytes that were written.
    Result<std::uint64_t> run() {
        TRY_VOID(run_in_pieces<Memory>(
            top_.size(), job_.workers, control_,
            [&](GuestRange piece, Memory& memory) { return copy_piece(piece, memory); }));
        return copied_;
    }

private:
    /// What a run of bytes of the image is.
    enum class Kind : std::uint8_t { of_base, zeros, data, compressed };
    struct Run {
        Kind kind = Kind::of_base;
        std::uint64_t length = 0;
    };

    struct Memory {
        std::vector<std::byte> data = std::vector<std::byte>(piece_bytes);
    };

    Result<void> copy_piece(GuestRange piece, Memory& memory) {
        for (GuestOffset at = piece.start, end = at + piece.length; at < end;) {
            const auto run = TRY(run_at(at, end - at));
            if (run.kind == Kind::zeros) TRY_VOID(write_zeroes(at, run.length));
            if (run.kind == Kind::data || run.kind == Kind::compressed) {
                const auto data = std::span(memory.data).first(run.length);
                TRY_VOID(top_.read(at, data));
                TRY_VOID(run.kind == Kind::data ? base_.write(at, data) : write_compressed(at, data));
                copied_ += run.length;
            }
            at += run.length;
        }
        return {};
    }

    /// The longest run of one kind from `at` on, of many extents if need be.
    Result<Run> run_at(GuestOffset at, std::uint64_t limit) {
        Run run;
        while (run.length < limit) {
            const auto extent = TRY(top_.extent(at + run.length, limit - run.length));
            const auto kind = kind_of(extent);
            if (run.length != 0 && kind != run.kind) break;
            run.kind = kind;
            run.length += extent.length;
        }
        return run;
    }

    [[nodiscard]] Kind kind_of(const Extent& extent) const {
        if (extent.kind == Extent::Kind::data) return extent.compressed && compresses_ ? Kind::compressed : Kind::data;
        // Behind the end of a layer that is shorter than those above it, the base is hidden: there, layers further up
        // are the last ones that were asked.
        const bool reaches_base = extent.kind == Extent::Kind::unallocated && extent.depth + 1 == layers_;
        return reaches_base ? Kind::of_base : Kind::zeros;
    }

    /// Only where the base has something else: there, too, holes are to stay holes.
    Result<void> write_zeroes(GuestOffset at, std::uint64_t length) {
        return each_extent(base_, at, length, [&](const Extent& there) -> Result<void> {
            if (there.kind != Extent::Kind::data) return {};
            copied_ += there.length;
            return base_.write_zeroes(there.start, there.length);
        });
    }

    /// Whole clusters of the base compressed, the ends as they are.
    Result<void> write_compressed(GuestOffset at, std::span<const std::byte> data) {
        const std::uint64_t block = base_.block_size();
        const std::uint64_t end = at.value + data.size();
        const std::uint64_t first = std::min(divide_up(at.value, block) * block, end);
        const std::uint64_t last = std::max(first, end == base_.size() ? end : align_down(end, block));
        const auto part = [&](std::uint64_t from, std::uint64_t to) {
            return data.subspan(from - at.value, to - from);
        };
        if (first > at.value) TRY_VOID(base_.write(at, part(at.value, first)));
        if (last > first) TRY_VOID(base_.write_compressed({first}, part(first, last)));
        return end > last ? base_.write({last}, part(last, end)) : Result<void>();
    }

    const CommitJob& job_;
    const JobControl& control_;
    Image& top_;
    const std::size_t layers_;
    Image& base_;
    const bool compresses_;
    std::atomic<std::uint64_t> copied_ = 0;
};

/// An open image with its chain, from the top down.
struct Chain {
    std::vector<std::shared_ptr<Layer>> layers;
    std::vector<ReferenceInfo> names;  // of all layers except the first, as the layer above has them

    [[nodiscard]] std::string path(std::size_t i) const { return layers[i]->files().front(); }
};

Result<Chain> chain_of(const std::shared_ptr<Image>& image) {
    Chain chain;
    for (auto layer = image; layer; layer = layer->backing()) {
        chain.layers.push_back(std::dynamic_pointer_cast<Layer>(layer));
        auto info = TRY(layer->info());
        if (layer->backing()) chain.names.push_back(*std::move(info.backing));
    }
    return chain;
}

/// Whether both paths lead to the same file, as far as that can be told.
bool is_same_file(const std::string& a, const std::string& b) {
    std::error_code none;
    return a == b || fs::equivalent(a, b, none);
}

/// Finds the layer that is meant by `name`.
Result<std::size_t> find_base(const Chain& chain, const std::string& name) {
    if (name.empty()) return 1;
    std::vector<std::size_t> found;
    for (std::size_t i = 1; i < chain.layers.size(); ++i) {
        const auto path = chain.path(i);
        const auto leads_there = [&](const Result<Location>& location) {
            return location && is_same_file(location->path, path);
        };
        if (chain.names[i - 1].name == name || leads_there(parse_location(name)) ||
            leads_there(parse_location(name, chain.path(0))))
            found.push_back(i);
    }
    if (found.size() == 1) return found.front();
    std::string all;
    const bool none = found.empty();
    if (none) {
        for (std::size_t i = 1; i < chain.layers.size(); ++i) found.push_back(i);
    }
    for (const auto i : found) all += fmt::format("{}{}", all.empty() ? "" : ", ", printable(chain.path(i)));
    return fail(
        Errc::invalid_argument, name,
        none ? fmt::format("it is not in the backing chain of {}, which has {}", chain.path(0), all)
             : fmt::format("the backing chain has several files that this may mean: {}; name one by its path", all));
}

/// The file that a layer names, for the gate.
Result<FileReference> reference_to(const Chain& chain, std::size_t layer) {
    const auto& name = chain.names[layer - 1];
    FileReference reference;
    reference.name = name.name;
    reference.location = TRY(format::parse_file_name(name.name));
    reference.location.path = name.path;
    reference.named_by = chain.path(layer - 1);
    reference.writable = true;
    return reference;
}

/// The name by which the top image is to record a layer that another image names.
Result<std::string> name_from_top(const Chain& chain, const FileReference& base) {
    const auto& path = base.location.path;
    const auto leads_there = [&](const std::string& name) {
        return !name.empty() && is_same_file(format::resolve(name, chain.path(0)), path);
    };
    if (leads_there(TRY(format::parse_file_name(base.name)).path)) return base.name;
    if (base.location.alone) {
        return fail(
            Errc::unsupported, chain.path(0),
            fmt::format("it is to record {} as its backing file, but without the backing file of that; use -d", path));
    }
    const auto directory = fs::path(chain.path(0)).parent_path();
    const auto relative = fs::path(path).lexically_normal().lexically_relative(directory.lexically_normal()).string();
    return recorded_name(leads_there(relative) ? relative : fs::absolute(path).string());
}

Result<void> verify_format_is_recorded(const Chain& chain, std::size_t base) {
    const auto& name = chain.names[base - 1];
    if (chain.layers[base]->format() != Format::raw || !name.format.empty()) return {};
    if (TRY(format::parse_file_name(name.name)).format) return {};
    return fail(Errc::invalid_argument, chain.path(base),
                fmt::format("that it is raw was only guessed, and what is written to it can change the next guess; "
                            "record it first: qcow rebase -u -b {} -F raw {}",
                            format::shell_word(name.name), format::shell_word(chain.path(base - 1))));
}

/// Adds the files of the chain. Those of the base, and of the top image unless it is kept, are written.
Result<void> add_files(FilesInUse& in_use, const Chain& chain, std::size_t base, bool keep) {
    for (std::size_t i = 0; i < chain.layers.size(); ++i) {
        const auto role = i == 0 ? "the image" : i == base ? "the base" : "a backing file of the image";
        const bool writes = i == base || (i == 0 && !keep);
        for (const auto& path : chain.layers[i]->files()) TRY_VOID(in_use.add(writes ? written : read, path, role));
    }
    return {};
}

/// What has other contents afterwards.
Result<std::vector<Warning>> changes(const Chain& chain, std::size_t base) {
    std::vector<Warning> result;
    const auto info = TRY(chain.layers.front()->info());
    if (!info.snapshots.empty()) {
        result.push_back(
            {Warning::Kind::odd_image,
             fmt::format("{}: its internal snapshots ({}) take from the changed base what they do not hold",
                         printable(chain.path(0)), info.snapshots.size())});
    }
    for (std::size_t i = 1; i < base; ++i) {
        result.push_back({Warning::Kind::odd_image,
                          fmt::format("{}: its contents are not valid afterwards, since {} below it changes",
                                      printable(chain.path(i)), printable(chain.path(base)))});
    }
    return result;
}

Result<CommitResult> run(const CommitJob& job, const JobControl& control) {
    Warnings warnings(control.warn);
    const auto& path = job.image.location.path;
    if (job.image.backing || job.image.location.alone) {
        return fail(Errc::invalid_argument, path,
                    "its contents are committed to a backing file that it records; qcow rebase -u records another one");
    }
    auto spec = job.image;
    const auto write = spec.write.value_or(WriteOptions());
    spec.write = job.keep ? std::nullopt : std::optional(write);
    spec.follow = true;
    const auto top = TRY(open_image(spec, warnings.to()));
    auto chain = TRY(chain_of(top));
    if (chain.layers.size() == 1)
        return fail(Errc::invalid_argument, path, "it has no backing file that its contents could be committed to");
    TRY_VOID(top->read({0}, std::span<std::byte>()));
    const auto layers = TRY(find_base(chain, job.base));
    TRY_VOID(verify_format_is_recorded(chain, layers));
    const auto reference = TRY(reference_to(chain, layers));
    const bool renames = !job.keep && layers > 1;
    const auto name = renames ? TRY(name_from_top(chain, reference)) : std::string();
    FilesInUse in_use;
    TRY_VOID(add_files(in_use, chain, layers, job.keep));
    auto changed = TRY(changes(chain, layers));

    // The chain ends above the base from now on, which is opened for writing by itself. What comes from it is not read.
    OpenOptions options;
    options.writable = true;
    options.write = write;
    options.format = chain.layers[layers]->format();
    if (reference.location.alone) options.backing = nullptr;
    options.gate = gate_for(spec, false);
    options.keys = keys_for({.location = reference.location, .keys = spec.keys});
    options.max_kdf_seconds = spec.max_kdf_seconds;
    options.warn = [&](const std::string& message) { warnings.add({Warning::Kind::odd_image, message}); };
    chain.layers[layers - 1]->exchange_backing(nullptr);
    chain.layers.clear();
    auto opened = options.gate(reference);
    if (!opened) return std::unexpected(std::move(opened).error().in("base"));
    const auto base = TRY(open_image(*std::move(opened), options));
    TRY_VOID(base->read({0}, std::span<std::byte>()));
    for (auto& warning : changed) warnings.add(std::move(warning));
    CommitResult result;
    result.bytes = top->size();
    result.copied_bytes =
        TRY(commit_layers({*top, layers, *base, renames ? std::optional(name) : std::nullopt}, job, control));
    result.warnings = warnings.take();
    return result;
}

}  // namespace

Result<std::uint64_t> commit_layers(const CommitImages& images, const CommitJob& job, const JobControl& control) {
    auto& [top, layers, base, new_name] = images;
    if (base.size() < top.size()) {
        if (auto grown = base.resize(top.size()); !grown) {
            auto error = std::move(grown).error();
            error.what += "; the base is smaller than the image, and cannot grow";
            return std::unexpected(std::move(error));
        }
    }
    const auto info = TRY(base.info());
    const bool compresses = base.format() == Format::qcow2 && !info.data_file && !info.encryption;
    const auto copied = TRY(CommitCopy(job, control, top, layers, base, compresses).run());
    TRY_VOID(base.flush());
    TRY_VOID(base.close());
    // The base is durable. It stays open, and so locked, until nothing but it has the contents.
    if (new_name) TRY_VOID(top.change_backing(*new_name, base.format()));
    if (!job.keep) TRY_VOID(top.make_empty());
    TRY_VOID(top.close());
    return copied;
}

Result<CommitResult> commit(const CommitJob& job, const JobControl& control) {
    return within_memory([&] { return run(job, control); });
}

}  // namespace qcow
