#include "operation/metadata_files.h"

#include <fmt/format.h>

#include <array>
#include <filesystem>
#include <system_error>

#include "base/endian.h"
#include "base/try.h"
#include "format/file_name.h"
#include "format/header.h"
#include "image/gate.h"
#include "luks/volume.h"
#include "qcow2/data_file.h"
#include "qcow2/metadata/directories.h"
#include "qcow2/repair_directories.h"

namespace qcow {
namespace {

/// Null if the image has none.
Result<std::shared_ptr<Storage>> open_data_file(const Storage& file, const ImageSpec& spec) {
    const auto header = TRY(format::parse_header(TRY(qcow2::read_parsable_header(file)).cluster));
    if (!header.has(format::incompatible::external_data)) return nullptr;
    constexpr auto role = FileReference::Role::data_file;
    const auto name = header.data_file_name.value_or("");
    auto location = TRY(format::parse_file_name(name, role));
    location.path = format::resolve(location.path, file.name());
    return gate_for(spec, false)({role, name, std::move(location), file.name()});
}

}  // namespace

Result<MetadataFiles> open_metadata_files(const ImageSpec& spec, bool writable, std::string_view done) {
    const auto& path = spec.location.path;
    MetadataFiles files;
    files.image = TRY(open_storage(spec.location, {.writable = writable, .force_share = spec.force_share}));
    std::array<std::byte, 8> start = {};
    TRY(files.image->read({0}, start));
    const bool is_qcow2 = load_be<std::uint32_t>(start, 0) == format::magic && load_be<std::uint32_t>(start, 4) != 1;
    if (!is_qcow2 || spec.location.format.value_or(Format::qcow2) != Format::qcow2)
        return fail(Errc::unsupported, path, fmt::format("only qcow2 images can be {}", done));
    auto data_file = open_data_file(*files.image, spec);
    if (!data_file) return std::unexpected(std::move(data_file).error().in(path));
    files.data = *std::move(data_file);
    return files;
}

Result<std::shared_ptr<const crypto::SectorCipher>> find_cipher(const ImageSpec& spec, const Storage& image) {
    const auto header = TRY(format::parse_header(TRY(qcow2::read_first_cluster(image))));
    if (const auto& luks = header.encryption) {
        const auto seconds = TRY(luks::key_seconds({image, luks->offset, luks->length}));
        TRY_VOID(luks::verify_work(image, seconds, spec.max_kdf_seconds));
    }
    const auto key = TRY(keys_for(spec)({image.name(), header.crypt == format::Crypt::luks ? "luks" : "aes", 0}));
    return qcow2::unlock(header, image, key, spec.max_kdf_seconds);
}

Result<ExaminedImage> open_to_examine(const ImageSpec& spec, const Warn& warn) {
    auto image = open_image(spec, warn);
    if (image) return ExaminedImage{*std::move(image), {}};
    if (image.error().code == Errc::no_memory) return std::unexpected(std::move(image).error());
    // The image itself may be sound, or worth a diagnosis.
    auto alone = spec;
    alone.follow = false;
    auto opened = open_image(alone, warn);
    if (!opened) return std::unexpected(std::move(image).error());
    return ExaminedImage{*std::move(opened), CheckFinding{CheckFinding::Severity::error, "backing chain",
                                                          image.error().message(), CheckFinding::Kind::backing_chain}};
}

void add_broken_chain(CheckReport& report, const std::optional<CheckFinding>& broken_chain) {
    if (!broken_chain) return;
    ++report.errors;
    report.findings.insert(report.findings.begin(), *broken_chain);
}

bool is_device(const ImageSpec& spec) {
    std::error_code unknown;
    return std::filesystem::is_block_file(spec.location.path, unknown);
}

}  // namespace qcow
