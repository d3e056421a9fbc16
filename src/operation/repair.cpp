#include "qcow/repair.h"

#include <fmt/format.h>

#include "base/endian.h"
#include "base/within_memory.h"
#include "format/file_name.h"
#include "format/header.h"
#include "image/gate.h"
#include "qcow/text.h"
#include "qcow2/repair.h"
#include "qcow2/repair_directories.h"

namespace qcow {
namespace {

/// The external data file, for reading; null if the image has none.
Result<std::shared_ptr<Storage>> open_data_file(const Storage& file, const ImageSpec& spec) {
    const auto header = TRY(format::parse_header(TRY(qcow2::read_parsable_header(file)).cluster));
    if (!header.has(format::incompatible::external_data)) return nullptr;
    constexpr auto role = FileReference::Role::data_file;
    const auto name = header.data_file_name.value_or("");
    auto location = TRY(format::parse_file_name(name, role));
    location.path = format::resolve(location.path, file.name());
    return gate_for(spec, false)({role, name, std::move(location), file.name()});
}

Result<RepairResult> run(const ImageSpec& spec, const RepairOptions& options) {
    const auto& path = spec.location.path;
    const FileOptions file_options{.writable = !options.dry_run, .force_share = spec.force_share};
    auto file = TRY(open_storage(spec.location, file_options));
    std::array<std::byte, 8> start = {};
    TRY(file->read({0}, start));
    const bool is_qcow2 = load_be<std::uint32_t>(start, 0) == format::magic && load_be<std::uint32_t>(start, 4) != 1;
    if (!is_qcow2 || spec.location.format.value_or(Format::qcow2) != Format::qcow2)
        return fail(Errc::unsupported, path, "only qcow2 images can be repaired");
    auto data_file = open_data_file(*file, spec);
    if (!data_file) return std::unexpected(std::move(data_file).error().in(path));
    return qcow2::repair_image(std::move(file), data_file->get(), options);
}

}  // namespace

std::string text_of(const RepairLoss& loss) {
    switch (loss.what) {
        case RepairLoss::What::guest_data:
            return fmt::format("{} guest bytes from {:#x} on{} are lost and will {}: {}", loss.length, loss.guest.value,
                               loss.in_snapshots ? " in snapshots" : "",
                               loss.reads_as_zeros ? "read as zeros" : "show what the backing file has",
                               printable(loss.why));
        case RepairLoss::What::snapshot:
            if (loss.name.empty()) return fmt::format("internal snapshots are lost: {}", printable(loss.why));
            return fmt::format("internal snapshot \"{}\" is lost: {}", printable(loss.name), printable(loss.why));
        case RepairLoss::What::bitmap:
            if (loss.name.empty()) return fmt::format("all bitmaps are lost: {}", printable(loss.why));
            return fmt::format("bitmap \"{}\" is lost: {}", printable(loss.name), printable(loss.why));
    }
    return "";
}

Result<RepairResult> repair(const ImageSpec& spec, const RepairOptions& options) {
    return within_memory([&] { return run(spec, options); });
}

}  // namespace qcow
