#include "build/source.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <filesystem>
#include <optional>

#include "base/bits.h"
#include "qcow/filesystem.h"
#include "qcow/image_spec.h"
#include "qcow/text.h"
#include "storage/file.h"

namespace qcow {
namespace {

/// "IMAGE:N", where no file has that name.
struct Named {
    std::string path;
    std::optional<unsigned> partition;
};

Named named(const std::string& source) {
    struct stat status = {};
    const auto colon = source.rfind(':');
    if (colon == std::string::npos || stat(source.c_str(), &status) == 0) return {source, {}};
    unsigned number = 0;
    const auto* end = source.data() + source.size();
    const auto [last, error] = std::from_chars(source.data() + colon + 1, end, number);
    if (error != std::errc() || last != end || number == 0) return {source, {}};
    return {source.substr(0, colon), number};
}

/// Whether it is an archive, by its first bytes: of tar, or of a compression that archives have.
Result<bool> holds_archive(const std::string& path) {
    const FileDescriptor fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
    if (fd.get() < 0) return system_error("cannot open", path, errno);
    std::array<char, 512> bytes = {};
    const auto got = pread(fd.get(), bytes.data(), bytes.size(), 0);
    if (got < 0) return system_error("cannot read", path, errno);
    const std::string_view start(bytes.data(), static_cast<std::size_t>(got));
    using namespace std::string_view_literals;
    constexpr auto compressed = std::to_array<std::string_view>({"\x1f\x8b"sv, "BZh"sv,
                                                                 "\xfd"
                                                                 "7zXZ\0"sv,
                                                                 "\x28\xb5\x2f\xfd"sv});
    if (std::ranges::any_of(compressed, [&](auto signature) { return start.starts_with(signature); })) return true;
    if (start.size() < bytes.size()) return false;
    if (start.substr(257, 5) == "ustar") return true;
    // An archive without files is some blocks of zeros. No disk is so small.
    struct stat status = {};
    constexpr off_t most_empty = 10240;
    if (fstat(fd.get(), &status) != 0) return system_error("cannot read", path, errno);
    if (status.st_size > most_empty) return false;
    std::array<char, most_empty> all = {};
    const auto length = pread(fd.get(), all.data(), all.size(), 0);
    return length >= 1024 && is_zero(std::as_bytes(std::span(all).first(static_cast<std::size_t>(length))));
}

/// Refuses a target that exists and is a file of a source.
Result<void> verify_lies_outside(const std::string& target, const std::string& directory) {
    std::error_code error;
    const auto file = std::filesystem::canonical(target, error);
    if (error || !std::filesystem::is_regular_file(file, error)) return {};
    const auto top = std::filesystem::canonical(directory, error);
    if (error || std::ranges::mismatch(top, file).in1 != top.end()) return {};
    return fail(
        Errc::invalid_argument, printable(target),
        fmt::format("the target would overwrite a file of the source {}; choose another file", printable(directory)));
}

Result<Tree> tree_of_disk(std::shared_ptr<Disk> disk, const std::string& source, const SourceContext& context) {
    auto files = TRY(open_file_system(disk));
    for (const auto& warning : TRY(files->info()).warnings)
        context.warnings.add({Warning::Kind::odd_image, fmt::format("{}: {}", printable(source), warning)});
    return tree_of_files(std::move(disk), std::move(files));
}

}  // namespace

Result<std::shared_ptr<Disk>> disk_of_source(const std::string& source, const SourceContext& context) {
    const auto [path, partition] = named(source);
    ImageSpec spec{
        .location = TRY(parse_location(path)), .untrusted = context.job.target.untrusted, .keys = context.job.keys};
    auto image = TRY(open_image(spec, context.warnings.to()));
    TRY_VOID(context.in_use.add(FilesInUse::Use::read, *image, spec, "a source"));
    if (!partition) return image;
    return partition_disk(std::move(image), *partition);
}

Result<Tree> tree_of(const std::string& source, const SourceContext& context) {
    struct stat status = {};
    const auto [path, partition] = named(source);
    if (stat(path.c_str(), &status) != 0)
        return fail(Errc::not_found, printable(source), "there is no such directory, archive or image");
    const bool is_directory = S_ISDIR(status.st_mode);
    const bool is_archive = S_ISREG(status.st_mode) && TRY(holds_archive(path));
    if (partition && (is_directory || is_archive)) {
        return fail(Errc::invalid_argument, printable(source),
                    fmt::format("{} is {} and has no partitions; leave out \":{}\"", printable(path),
                                is_directory ? "a directory" : "an archive", *partition));
    }
    if (is_directory) {
        TRY_VOID(verify_lies_outside(context.job.target.path, path));
        return tree_of_directory(path);
    }
    if (is_archive) {
        TRY_VOID(context.in_use.add(FilesInUse::Use::read, path, "a source"));
        return tree_of_archive(path);
    }
    auto tree = tree_of_disk(TRY(disk_of_source(source, context)), source, context);
    if (!tree) return std::unexpected(std::move(tree).error().in(printable(source)));
    return tree;
}

}  // namespace qcow
