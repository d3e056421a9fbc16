#include <fmt/format.h>

#include <array>
#include <set>
#include <string>
#include <vector>

#include "base/endian.h"
#include "base/within_memory.h"
#include "disk/pending_image.h"
#include "format/file_name.h"
#include "format/header.h"
#include "qcow/image.h"
#include "qcow/text.h"
#include "qcow1/qcow1_image.h"
#include "qcow2/image.h"
#include "raw/raw_image.h"

namespace qcow {
namespace {

constexpr std::size_t max_chain_length = 256;
constexpr std::size_t min_layer_cache_bytes = std::size_t{256} << 10;

struct FormatEntry {
    Format format;
    std::string_view name;
    Result<std::unique_ptr<PendingImage>> (*begin)(std::shared_ptr<Storage>);
};
constexpr std::array formats = {
    FormatEntry{Format::raw, "raw", raw::begin},
    FormatEntry{Format::qcow, "qcow", qcow1::begin},
    FormatEntry{Format::qcow2, "qcow2", qcow2::begin},
};

const FormatEntry& entry_of(Format format) { return formats[static_cast<std::size_t>(format)]; }

Result<Format> probe(const Storage& storage) {
    std::array<std::byte, 8> start = {};
    TRY(storage.read({0}, start));
    if (load_be<std::uint32_t>(start, 0) != format::magic) return Format::raw;
    return load_be<std::uint32_t>(start, 4) == 1 ? Format::qcow : Format::qcow2;
}

struct Layer {
    std::shared_ptr<Storage> storage;
    std::unique_ptr<PendingImage> pending;
    std::shared_ptr<Storage> data_file;
    bool top = false;
    bool guessed = false;  // what format it has
};

Result<FileReference> reference_to(FileReference::Role role, const std::string& name, const Layer& by) {
    auto parsed = format::parse_file_name(name);
    if (!parsed) {
        auto error = std::move(parsed).error();
        return std::unexpected(std::move(error)
                                   .in(role == FileReference::Role::backing_file
                                           ? "backing file name (header field backing_file_offset, byte 8)"
                                           : "data file name (header extension 0x44415441)")
                                   .in(by.storage->name()));
    }
    FileReference reference{role, name, format::resolve(parsed->path, by.storage->name()), by.storage->name()};
    reference.guessed = by.guessed;
    return reference;
}

/// Opens what a layer names, unless the layer is one that nobody vouches for.
Result<std::shared_ptr<Storage>> pass_gate(const FileReference& reference, const Layer& by, const Gate& gate) {
    if (by.guessed && !by.top) {
        return fail(
            Errc::refused_by_policy, by.storage->name(),
            fmt::format("it names \"{}\", but that it is an image at all was only guessed from its contents, which a "
                        "guest may have "
                        "written; record the format in the overlay above it (qemu-img rebase -u -F FORMAT -b ...)",
                        reference.name));
    }
    auto opened = gate(reference);
    if (!opened) {
        const auto* role = reference.role == FileReference::Role::backing_file ? "backing file" : "data file";
        return std::unexpected(std::move(opened).error().in(fmt::format("{} of {}", role, by.storage->name())));
    }
    return opened;
}

class ChainOpener {
public:
    explicit ChainOpener(const OpenOptions& options) : options_(options) {}

    Result<std::shared_ptr<Image>> open(std::shared_ptr<Storage> storage) {
        auto next = std::optional(Named{std::move(storage), options_.format});
        while (next) {
            TRY_VOID(add(std::move(*next)));
            next = TRY(follow(layers_.back()));
        }
        return build();
    }

private:
    struct Named {
        std::shared_ptr<Storage> storage;
        std::optional<Format> format;
    };

    Result<void> add(Named file) {
        const auto& name = file.storage->name();
        if (layers_.size() == max_chain_length) {
            return fail(Errc::limit_exceeded, name,
                        fmt::format("the backing chain is longer than {} files", max_chain_length));
        }
        if (!identities_.insert(file.storage->identity()).second)
            return fail(Errc::corrupt, name, "the backing chain is a loop: this file is in it already");
        Layer layer;
        layer.top = layers_.empty();
        layer.guessed = !file.format;
        const Format format = file.format ? *file.format : TRY(probe(*file.storage));
        if (layer.guessed && !layer.top && options_.warn) {
            options_.warn(fmt::format("{}: its format is not recorded in the overlay above it; guessed to be {}",
                                      printable(name), format_name(format)));
        }
        auto pending = entry_of(format).begin(file.storage);
        if (!pending) return std::unexpected(std::move(pending).error().in(name));
        layer.pending = *std::move(pending);
        layer.storage = std::move(file.storage);
        layers_.push_back(std::move(layer));
        return {};
    }

    /// Opens the files that `layer` names: gives the backing file, if there is one to go on with.
    Result<std::optional<Named>> follow(Layer& layer) {
        if (!options_.follow) return std::nullopt;
        if (const auto name = layer.pending->data_file()) {
            auto reference = TRY(reference_to(FileReference::Role::data_file, *name, layer));
            reference.writable = options_.writable && layers_.size() == 1;
            layer.data_file = TRY(pass_gate(reference, layer, options_.gate));
            if (!identities_.insert(layer.data_file->identity()).second) {
                return fail(Errc::corrupt, layer.data_file->name(), "it is used twice in the chain");
            }
        }
        const auto backing = layer.pending->backing();
        if (!backing) return std::nullopt;
        const auto reference = TRY(reference_to(FileReference::Role::backing_file, backing->name, layer));
        const auto format = TRY(format_of(*backing, layer));
        return Named{TRY(pass_gate(reference, layer, options_.gate)), format};
    }

    static Result<std::optional<Format>> format_of(const PendingImage::Backing& backing, const Layer& by) {
        if (!backing.format) return TRY(format::parse_file_name(backing.name)).format;
        // What QEMU calls the driver of a plain file or device is the raw format here.
        if (*backing.format == "file" || *backing.format == "host_device") return Format::raw;
        if (const auto format = format_from_name(*backing.format)) return format;
        return fail(Errc::unsupported, by.storage->name(),
                    fmt::format("its backing file \"{}\" has the format \"{}\"; only raw, qcow and qcow2 can be read",
                                backing.name, *backing.format));
    }

    /// From the bottom up, since each image is made with the one below it.
    Result<std::shared_ptr<Image>> build() {
        std::shared_ptr<Image> image;
        const auto cache_bytes = std::max(options_.cache_bytes / layers_.size(), min_layer_cache_bytes);
        for (; !layers_.empty(); layers_.pop_back()) {
            auto& layer = layers_.back();
            const bool writable = options_.writable && layers_.size() == 1;
            auto opened = layer.pending->open({std::move(image), std::move(layer.data_file), cache_bytes,
                                               writable ? std::optional(options_.write) : std::nullopt});
            if (!opened) return std::unexpected(std::move(opened).error().in(layer.storage->name()));
            image = *std::move(opened);
        }
        return image;
    }

    const OpenOptions& options_;
    std::vector<Layer> layers_;  // from the top down
    std::set<std::string> identities_;
};

}  // namespace

std::string_view format_name(Format format) { return entry_of(format).name; }

std::optional<Format> format_from_name(std::string_view name) {
    for (const auto& entry : formats) {
        if (entry.name == name) return entry.format;
    }
    return std::nullopt;
}

Result<std::shared_ptr<Image>> open_image(std::shared_ptr<Storage> storage, const OpenOptions& options) {
    return within_memory([&] { return ChainOpener(options).open(std::move(storage)); });
}

}  // namespace qcow
