#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <filesystem>
#include <set>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

#include "base/endian.h"
#include "base/within_memory.h"
#include "disk/pending_image.h"
#include "format/file_name.h"
#include "format/foreign.h"
#include "format/header.h"
#include "format/luks.h"
#include "image/gate.h"
#include "luks/luks_image.h"
#include "luks/volume.h"
#include "qcow/text.h"
#include "qcow1/qcow1_image.h"
#include "qcow2/qcow2_image.h"
#include "raw/raw_image.h"

namespace qcow {
namespace {

constexpr std::size_t max_chain_length = 4096;
constexpr std::size_t min_layer_cache_bytes = std::size_t{32} << 10;

struct FormatEntry {
    Format format;
    std::string_view name;
    Result<std::unique_ptr<PendingImage>> (*begin)(std::shared_ptr<Storage>);
};
constexpr std::array formats = {
    FormatEntry{Format::raw, "raw", raw::begin},
    FormatEntry{Format::qcow, "qcow", qcow1::begin},
    FormatEntry{Format::qcow2, "qcow2", qcow2::begin},
    FormatEntry{Format::luks, "luks", luks::begin},
};

const FormatEntry& entry_of(Format format) { return formats[static_cast<std::size_t>(format)]; }

struct OpenedLayer {
    std::shared_ptr<Storage> storage;
    Format format = Format::raw;
    std::unique_ptr<PendingImage> pending;
    std::shared_ptr<Storage> data_file;
    bool given = false;    // by the caller, and not by a layer above
    bool guessed = false;  // what format it has
    bool alone = false;    // there is nothing below, whatever it says
    std::string secret;    // the id of the one that its name gives
};

/// The parts of a file that tell what it is.
struct Ends {
    std::vector<std::byte> head;
    std::vector<std::byte> tail;
};

Result<Ends> ends_of(const Storage& storage) {
    Ends ends;
    const auto size = TRY(storage.size());
    ends.head.resize(std::min<std::uint64_t>(size, format::foreign_head_bytes));
    TRY(storage.read({0}, ends.head));
    ends.tail.resize(std::min<std::uint64_t>(size, format::foreign_tail_bytes));
    TRY(storage.read({size - ends.tail.size()}, ends.tail));
    return ends;
}

std::optional<format::Foreign> recognise(const Storage& storage) {
    const auto ends = ends_of(storage);
    return ends ? format::recognise_foreign(ends->head, ends->tail, storage.name()) : std::nullopt;
}

Result<Location> parse_reference(FileReference::Role role, const std::string& name, const OpenedLayer& by) {
    auto parsed = format::parse_file_name(name, role);
    if (parsed) return parsed;
    return std::unexpected(std::move(parsed)
                               .error()
                               .in(role == FileReference::Role::backing_file
                                       ? "backing file name (header field backing_file_offset, byte 8)"
                                       : "data file name (header extension 0x44415441)")
                               .in(by.storage->name()));
}

class ChainOpener {
public:
    explicit ChainOpener(const OpenOptions& options) : options_(options) {}

    Result<std::shared_ptr<Image>> open(std::shared_ptr<Storage> storage) {
        auto next = std::optional(Named{.storage = std::move(storage), .format = options_.format, .given = true});
        while (next) {
            TRY_VOID(add(std::move(*next)));
            next = TRY(follow(layers_.back()));
        }
        return build();
    }

private:
    struct Named {
        std::shared_ptr<Storage> storage;
        std::optional<Format> format = {};
        bool given = false;
        bool alone = false;
        std::string secret = {};
    };

    static constexpr std::string_view loop =
        "the backing chain is a loop: this file is in it already; qcow rebase -u records another backing file";

    static constexpr std::string_view used_twice =
        "it is used twice in the chain; qcow amend -o data_file=NAME records another data file";

    /// Whether the path leads to a file of the chain.
    [[nodiscard]] bool is_open(const std::string& path) const {
        return std::ranges::any_of(layers_, [&](const OpenedLayer& layer) {
            std::error_code none;
            return std::filesystem::equivalent(path, layer.storage->name(), none);
        });
    }

    void warn(const std::string& message) const {
        if (options_.warn) options_.warn(message);
    }

    Result<void> add(Named file) {
        const auto& name = file.storage->name();
        if (layers_.size() == max_chain_length) {
            return fail(Errc::limit_exceeded, name,
                        fmt::format("the backing chain is longer than {} files", max_chain_length));
        }
        if (!identities_.insert(file.storage->identity()).second) return fail(Errc::corrupt, name, std::string(loop));
        OpenedLayer layer;
        layer.given = file.given;
        layer.alone = file.alone;
        layer.secret = std::move(file.secret);
        layer.guessed = !file.format;
        layer.format = file.format ? *file.format : TRY(probe(*file.storage));
        if (layer.guessed && !layer.given) {
            warn(fmt::format("{}: its format is not recorded in the overlay above it; guessed to be {}",
                             printable(name), format_name(layer.format)));
        }
        auto pending = entry_of(layer.format).begin(file.storage);
        if (!pending) {
            auto error = std::move(pending).error();
            if (const auto foreign = recognise(*file.storage); foreign && layer.format != Format::luks)
                error.what += fmt::format("; it is {}: {}", foreign->what, foreign->remedy);
            return std::unexpected(std::move(error).in(name));
        }
        layer.pending = *std::move(pending);
        layer.storage = std::move(file.storage);
        layers_.push_back(std::move(layer));
        return {};
    }

    /// The format of a file of which nobody has said it.
    Result<Format> probe(const Storage& storage) const {
        const auto ends = TRY(ends_of(storage));
        if (ends.head.size() >= 4 && load_be<std::uint32_t>(ends.head, 0) == format::magic) {
            const bool old = ends.head.size() >= 8 && load_be<std::uint32_t>(ends.head, 4) == 1;
            return old ? Format::qcow : Format::qcow2;
        }
        const auto& name = storage.name();
        const auto* const option = layers_.empty()       ? "-f raw (-O raw of a target)"
                                   : layers_.size() == 1 ? "--backing-format raw"
                                                         : "the format raw, recorded in the overlay above it,";
        if (format::is_luks(ends.head)) {
            // A guest may have encrypted its disk itself.
            return fail(Errc::unsupported, name,
                        fmt::format("it is an encrypted volume (LUKS), and nothing says whether a guest reads it "
                                    "decrypted; the format luks and its key give what it holds, and {} takes its bytes "
                                    "for a disk's as they are",
                                    option));
        }
        if (const auto foreign = format::recognise_foreign(ends.head, ends.tail, name)) {
            return fail(Errc::unsupported, name,
                        fmt::format("it is {}, which is not read here: {}; {} takes its bytes for a disk's as they are",
                                    foreign->what, foreign->remedy, option));
        }
        if (!format::promises_qcow2(name)) return Format::raw;
        if (!format::looks_raw(ends.head)) {
            return fail(
                Errc::unsupported, name,
                fmt::format("its name says qcow2, but it has no qcow2 header: it is something else, or damaged, "
                            "or was not downloaded whole; {} takes it for a raw disk",
                            option));
        }
        warn(fmt::format("{}: its name says qcow2, but it has no qcow2 header; it is taken for a raw disk",
                         printable(name)));
        return Format::raw;
    }

    /// Opens the files that `layer` names: gives the backing file, if there is one to go on with.
    Result<std::optional<Named>> follow(OpenedLayer& layer) {
        if (layers_.size() == 1 && options_.backing) TRY_VOID(replace_backing(layer));
        // A writer of metadata needs the data file, too: a flush covers it.
        if (!options_.follow && !options_.writable) return std::nullopt;
        const auto data_file = layer.pending->data_file();
        const auto backing = options_.follow ? layer.pending->backing() : std::nullopt;
        if (layer.guessed && !layer.given && (data_file || backing))
            return refuse_guessed(data_file ? *data_file : backing->name);
        if (data_file) {
            constexpr auto role = FileReference::Role::data_file;
            const auto parsed = TRY(parse_reference(role, *data_file, layer));
            layer.data_file = TRY(pass_gate(role, *data_file, parsed, layer));
            if (!identities_.insert(layer.data_file->identity()).second) {
                return fail(Errc::corrupt, layer.data_file->name(), std::string(used_twice));
            }
        }
        if (!options_.follow) return std::nullopt;
        if (layers_.size() == 1 && options_.backing && *options_.backing) return given_backing(layer);
        if (!backing || layer.alone) return std::nullopt;
        return named_backing(*backing, layer);
    }

    /// What the caller wants below the topmost layer, in place of what that says.
    Result<void> replace_backing(OpenedLayer& top) {
        const auto named = top.pending->backing();
        if (*options_.backing) {
            if (top.format != Format::raw) return {};
            return fail(Errc::invalid_argument, top.storage->name(), "a raw disk has no backing file");
        }
        top.alone = true;
        if (!named) return {};
        if (options_.writable) {
            return fail(Errc::invalid_argument, top.storage->name(),
                        "without its backing file it is only read; writing would put zeros in the place of its data");
        }
        warn(fmt::format("{}: its backing file \"{}\" is left out: WHAT THE IMAGE DOES NOT HOLD ITSELF READS AS ZEROS",
                         printable(top.storage->name()), printable(named->name)));
        return {};
    }

    Result<std::optional<Named>> given_backing(const OpenedLayer& top) const {
        const auto named = top.pending->backing();
        if (!named) {
            warn(fmt::format("{}: it names no backing file; what it does not hold itself is read from {}",
                             printable(top.storage->name()), printable((*options_.backing)->name())));
        }
        auto format = options_.backing_format;
        if (!format && named && named->format) format = TRY(format_of(*named, top));
        return Named{.storage = *options_.backing, .format = format, .given = true};
    }

    Result<std::optional<Named>> named_backing(const PendingImage::Backing& backing, const OpenedLayer& layer) {
        constexpr auto role = FileReference::Role::backing_file;
        const auto attempt = [&]() -> Result<std::optional<Named>> {
            const auto parsed = TRY(parse_reference(role, backing.name, layer));
            auto format = layers_.size() == 1 ? options_.backing_format : std::nullopt;
            if (!format) format = backing.format ? TRY(format_of(backing, layer)) : parsed.format;
            return Named{.storage = TRY(pass_gate(role, backing.name, parsed, layer)),
                         .format = format,
                         .alone = parsed.alone,
                         .secret = parsed.secret};
        };
        auto named = attempt();
        if (named) return named;
        auto error = std::move(named).error();
        if (error.code == Errc::not_found && format::is_windows_path(backing.name))
            error.what += " (the name looks like a path of Windows)";
        if (error.code == Errc::limit_exceeded || error.code == Errc::no_memory)
            return std::unexpected(std::move(error));
        const auto file = format::shell_word(layer.storage->name());
        if (error.code == Errc::not_found)
            error.what += fmt::format("; qcow rebase -u -b FILE -F FORMAT {} records where it is now", file);
        if (options_.writable) return std::unexpected(std::move(error));
        error.what += layers_.size() == 1
                          ? "; --backing FILE gives another one, --no-backing reads the image alone"
                          : fmt::format("; --backing FILE gives another one to {} where that is read by itself", file);
        return std::unexpected(std::move(error));
    }

    Result<std::shared_ptr<Storage>> pass_gate(FileReference::Role role, const std::string& name, Location location,
                                               const OpenedLayer& by) const {
        location.path = format::resolve(location.path, by.storage->name());
        FileReference reference{role, name, std::move(location), by.storage->name()};
        reference.guessed = by.guessed;
        reference.writable = role == FileReference::Role::data_file && options_.writable && layers_.size() == 1;
        auto opened = options_.gate(reference);
        // The other process that has locked the file is this one.
        if (!opened && opened.error().code == Errc::locked && is_open(reference.location.path)) {
            const bool is_backing = role == FileReference::Role::backing_file;
            return fail(Errc::corrupt, reference.location.path, std::string(is_backing ? loop : used_twice));
        }
        if (!opened) {
            const auto* what = role == FileReference::Role::backing_file ? "backing file" : "data file";
            return std::unexpected(std::move(opened).error().in(fmt::format("{} of {}", what, by.storage->name())));
        }
        return opened;
    }

    /// Nobody has said that the last layer is an image, and it names a file. The remedy is a copy of the overlay that
    /// records the format.
    [[nodiscard]] std::unexpected<Error> refuse_guessed(const std::string& name) const {
        const auto& by = layers_.back();
        const auto& overlay = layers_[layers_.size() - 2];
        const auto format = format_name(by.format);
        const auto& path = overlay.storage->name();
        return fail(
            Errc::refused_by_policy, by.storage->name(),
            fmt::format("it names \"{}\", but that it is an image at all was only guessed from its contents, which "
                        "a guest may have written; if it is one, make an overlay that records its format: qcow "
                        "convert -O qcow2 --backing-format {} -B {} -F {} {} {}",
                        name, format, format::shell_word(overlay.pending->backing()->name), format,
                        format::shell_word(path), format::shell_word(path + ".new")));
    }

    static Result<std::optional<Format>> format_of(const PendingImage::Backing& backing, const OpenedLayer& by) {
        // What QEMU calls the driver of a plain file or device is the raw format here.
        if (*backing.format == "file" || *backing.format == "host_device") return Format::raw;
        if (const auto format = format_from_name(*backing.format)) return format;
        return fail(
            Errc::unsupported, by.storage->name(),
            fmt::format("its backing file \"{}\" has the format \"{}\"; only raw, qcow, qcow2 and luks can be read",
                        backing.name, *backing.format));
    }

    /// What is wrong with a layer, with the name of its file in front.
    static std::unexpected<Error> named(Error error, const std::string& file) {
        return std::unexpected(error.place.starts_with(file) ? std::move(error) : std::move(error).in(file));
    }

    /// A person is not to type a key that is then refused.
    Result<void> verify_work_of_keys() const {
        double all = 0;
        for (const auto& layer : layers_) {
            const auto seconds = layer.pending->key_seconds();
            if (!seconds) return named(seconds.error(), layer.storage->name());
            TRY_VOID(luks::verify_work(*layer.storage, *seconds, options_.max_kdf_seconds, all));
            all += *seconds;
        }
        return {};
    }

    /// The keys of the layers, from the top down.
    Result<std::vector<std::optional<Secret>>> ask_for_keys() {
        std::vector<std::optional<Secret>> keys(layers_.size());
        if (options_.keys) TRY_VOID(verify_work_of_keys());
        for (unsigned depth = 0; options_.keys && depth < layers_.size(); ++depth) {
            const auto& layer = layers_[depth];
            const auto method = layer.pending->encryption();
            if (!method) continue;
            keys[depth] =
                TRY(options_.keys({layer.storage->name(), *method, depth, layer.secret, layers_[0].storage->name()}));
            if (*method == "aes" && depth == 0 && options_.writable) {
                warn(
                    fmt::format("{}: its encryption (the legacy AES of qcow2) is weak; qcow convert -O qcow2 -o "
                                "encrypt.format=luks,... makes an image with a better one",
                                printable(layer.storage->name())));
            }
        }
        return keys;
    }

    /// From the bottom up, since each image is made with the one below it.
    Result<std::shared_ptr<Image>> build() {
        auto keys = TRY(ask_for_keys());
        std::shared_ptr<Layer> image;
        const auto cache_bytes = std::max(options_.cache_bytes / layers_.size(), min_layer_cache_bytes);
        for (; !layers_.empty(); layers_.pop_back()) {
            auto& layer = layers_.back();
            const bool writable = options_.writable && layers_.size() == 1;
            auto opened = layer.pending->open({std::move(image), layer.alone, std::move(layer.data_file), cache_bytes,
                                               writable ? std::optional(options_.write) : std::nullopt,
                                               std::move(keys.back()), options_.max_kdf_seconds});
            keys.pop_back();
            if (!opened) return named(std::move(opened).error(), layer.storage->name());
            image = *std::move(opened);
        }
        return image;
    }

    const OpenOptions& options_;
    std::vector<OpenedLayer> layers_;  // from the top down
    std::set<std::string> identities_;
};

Result<std::shared_ptr<Image>> open_spec(const ImageSpec& spec, const Warn& warn) {
    const FileOptions read_only{.force_share = spec.force_share};
    OpenOptions options;
    options.format = spec.location.format;
    options.gate = gate_for(spec, spec.force_share);
    options.follow = spec.follow;
    options.backing_format = spec.backing_format;
    options.writable = spec.write.has_value();
    if (spec.write) options.write = *spec.write;
    options.keys = keys_for(spec);
    options.max_kdf_seconds = spec.max_kdf_seconds;
    if (warn) options.warn = [&](const std::string& message) { warn({Warning::Kind::odd_image, message}); };

    auto storage =
        TRY(open_storage(spec.location, spec.write ? FileOptions{.writable = true, .direct = spec.direct} : read_only));
    if (spec.location.alone) options.backing = nullptr;
    if (spec.backing) {
        auto backing = open_storage(*spec.backing, read_only);
        if (!backing) return std::unexpected(std::move(backing).error().in("backing file"));
        options.backing = *std::move(backing);
        if (!options.backing_format) options.backing_format = spec.backing->format;
    }
    auto image = TRY(open_image(std::move(storage), options));
    if (warn && spec.write && !options.format && image->format() == Format::raw) {
        warn({Warning::Kind::guessed_format,
              fmt::format("{}: that it is raw was only guessed, and what is written to it can change the next guess",
                          printable(spec.location.path)),
              Format::raw});
    }
    return image;
}

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

Result<std::shared_ptr<Image>> open_image(const ImageSpec& spec, const Warn& warn) {
    return within_memory([&] { return open_spec(spec, warn); });
}

}  // namespace qcow
