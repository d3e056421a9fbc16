#include "operation/new_image.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <csignal>
#include <filesystem>
#include <optional>

#include "base/bits.h"
#include "base/within_memory.h"
#include "qcow/text.h"

namespace qcow {
namespace {

constexpr std::string_view incomplete = "was written in place and is incomplete; its earlier contents are gone";

/// Warns where the name of a new file ends as those of another format do.
void warn_of_ending(const NewImage& image, Warnings& warnings) {
    auto ending = std::filesystem::path(image.path).extension().string();
    for (auto& c : ending) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
    constexpr auto endings =
        std::to_array<std::string_view>({".raw", ".qcow", ".qcow2", ".qed", ".vdi", ".vhd", ".vhdx", ".vmdk", ".vpc"});
    const auto format = format_name(image.format);
    if (std::ranges::find(endings, ending) == endings.end() || ending.substr(1) == format) return;
    const bool qcow2 = ending.starts_with(".qcow");
    if (qcow2 && image.format == Format::qcow2) return;
    Warning warning{Warning::Kind::misleading_name, fmt::format("{}: it will be {}, although its name says {}",
                                                                printable(image.path), format, ending.substr(1))};
    if (qcow2 || ending == ".raw") {
        warning.format = qcow2 ? Format::qcow2 : Format::raw;
    } else {
        warning.message += "; qemu-img convert can make that";
    }
    warnings.add(std::move(warning));
}

/// Lets the signals that end a process wait, as long as this lives and no other thread takes them.
class SignalsWait {
public:
    SignalsWait() {
        sigset_t waiting;
        sigemptyset(&waiting);
        for (const int signal : {SIGINT, SIGTERM, SIGHUP}) sigaddset(&waiting, signal);
        pthread_sigmask(SIG_BLOCK, &waiting, &before_);
    }
    SignalsWait(const SignalsWait&) = delete;
    SignalsWait& operator=(const SignalsWait&) = delete;
    ~SignalsWait() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

private:
    sigset_t before_ = {};
};

Result<NewFile> begin(const std::string& path, const std::string& role, NewFile::Existing existing, FilesInUse& in_use,
                      Warnings& warnings) {
    auto file = NewFile::begin(path, in_use, role, existing);
    if (file && !file->obstacle().empty()) {
        warnings.add({Warning::Kind::written_in_place,
                      fmt::format("{}: {}, so that it cannot be replaced; it is emptied and written in place",
                                  printable(path), file->obstacle())});
    }
    return file;
}

class Files {
public:
    Files(NewFile image, std::optional<NewFile> data_file)
        : image_(std::move(image)), data_file_(std::move(data_file)) {}

    Result<void> fill(const Fill& fill) const {
        return within_memory([&] {
            return fill({image_.storage(), data_file_ ? data_file_->storage() : nullptr}, image_.starts_as_zeros());
        });
    }

    /// Names both, or none.
    Result<void> publish(NewFile::Contents contents) {
        if (!data_file_) return image_.publish(contents);
        if (contents == NewFile::Contents::durable) {
            // What takes long and may fail, before one of both has its name.
            TRY_VOID(data_file_->storage()->flush());
            TRY_VOID(image_.storage()->flush());
        }
        const SignalsWait both_or_none;
        TRY_VOID(data_file_->publish(contents));
        auto published = image_.publish(contents);
        if (!published) {
            published.error().what +=
                fmt::format("; its data file {} was made and stays", data_file_->storage()->name());
        }
        return published;
    }

    [[nodiscard]] bool image_is_incomplete() const { return image_.is_incomplete(); }
    [[nodiscard]] bool data_file_is_incomplete() const { return data_file_ && data_file_->is_incomplete(); }

private:
    NewFile image_;
    std::optional<NewFile> data_file_;
};

}  // namespace

Result<std::uint64_t> size_for(const Disk& source, const CreateOptions& options) {
    if (options.size == 0) return rounded_size(source.size());
    const std::uint64_t size = rounded_size(options.size);
    if (size >= source.size()) return size;
    return fail(Errc::invalid_argument, "option size",
                fmt::format("the source has {} bytes, and {} have no room for them", source.size(), size));
}

Result<void> verify_raw(const CreateOptions& options) {
    if (options.preallocation == Preallocation::metadata)
        return fail(Errc::invalid_argument, "option preallocation", "a raw disk has no metadata; say falloc or full");
    if (rounded_size(options.size) > low_bits(63))
        return fail(Errc::invalid_argument, "option size", "a disk has less than 2^63 bytes; choose a smaller size");
    CreateOptions possible;
    possible.size = options.size;
    possible.preallocation = options.preallocation;
    if (options == possible) return {};
    return fail(Errc::invalid_argument, "options",
                "a raw disk has only size and preallocation; the others are for qcow2");
}

Result<void> verify_luks(CreateOptions options) {
    if (!options.encryption) {
        return fail(Errc::invalid_argument, "option key-secret",
                    "a luks disk needs the key that opens it (-o key-secret=ID, and --object secret,id=ID,file=FILE)");
    }
    if (options.preallocation == Preallocation::metadata)
        return fail(Errc::invalid_argument, "option preallocation", "a luks disk has no metadata; say falloc or full");
    options.encryption.reset();
    return verify_raw(options);
}

Result<NewImage> with_recorded_names(NewImage image) {
    auto& options = image.options;
    if (!options.backing_name.empty()) {
        const auto location = TRY(parse_location(options.backing_name));
        if (options.backing_format.empty() && location.format) options.backing_format = format_name(*location.format);
        options.backing_name = TRY(recorded_name(options.backing_name));
    }
    if (!options.data_file_name.empty())
        options.data_file_name = TRY(recorded_name(TRY(parse_location(options.data_file_name)).path));
    return image;
}

Result<ImageSpec> backing_of(const NewImage& image) {
    if (image.options.backing_format.empty()) {
        return fail(
            Errc::invalid_argument, "backing file",
            "its format is to be recorded; say which it is: raw, qcow or qcow2 (-F, or the option backing_fmt)");
    }
    const auto location = TRY(parse_location(image.options.backing_name, image.path));
    ImageSpec spec{.location = {.path = location.path, .alone = location.alone, .secret = location.secret}};
    spec.location.format = format_from_name(image.options.backing_format);
    spec.untrusted = image.untrusted;
    spec.keys = image.keys;
    return spec;
}

Result<void> add_alone(FilesInUse& in_use, FilesInUse::Use use, const ImageSpec& spec, const std::string& role) {
    TRY_VOID(in_use.add(use, spec.location.path, role));
    const auto storage = open_storage(spec.location, {.force_share = true});
    if (!storage) return {};
    OpenOptions options;
    options.follow = false;
    options.format = spec.location.format;
    const auto image = open_image(*storage, options);
    if (!image) return {};
    const auto info = TRY((*image)->info());
    if (!info.data_file || info.data_file->path.empty()) return {};
    return in_use.add(use, info.data_file->path, "the data file of " + role);
}

Result<void> make_files(const NewImage& image, const std::string& role, FilesInUse& in_use, Warnings& warnings,
                        const Fill& fill) {
    using enum NewFile::Existing;
    if (image.verify) TRY_VOID(image.verify());
    auto image_file = TRY(begin(image.path, role, replaced, in_use, warnings));
    std::optional<NewFile> data_file;
    std::string data_file_path;
    if (!image.options.data_file_name.empty()) {
        data_file_path = TRY(parse_location(image.options.data_file_name, image.path)).path;
        auto begun = begin(data_file_path, "the data file of " + role, only_if_empty, in_use, warnings);
        if (!begun) return std::unexpected(std::move(begun).error().in("data file"));
        data_file.emplace(*std::move(begun));
    }
    Files files(std::move(image_file), std::move(data_file));
    warn_of_ending(image, warnings);
    auto done = files.fill(fill);
    if (done) done = files.publish(image.contents);
    if (done) return done;
    auto error = std::move(done).error();
    if (files.image_is_incomplete()) error.what += fmt::format("; {} {}", image.path, incomplete);
    if (files.data_file_is_incomplete()) error.what += fmt::format("; {} {}", data_file_path, incomplete);
    return std::unexpected(std::move(error));
}

}  // namespace qcow
