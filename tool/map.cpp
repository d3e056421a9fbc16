// qcow map: shows where guest bytes are stored.

#include <fmt/format.h>

#include <iterator>

#include "command.h"
#include "qcow/text.h"
#include "text.h"

namespace tool {
namespace {

struct MapOptions {
    Source source;
    bool json = false;
};

/// Collects text and prints it in large pieces, because a map may have millions of lines.
class Output {
public:
    template <class... Args>
    void print(fmt::format_string<Args...> format, Args&&... args) {
        fmt::format_to(std::back_inserter(text_), format, std::forward<Args>(args)...);
        if (text_.size() > 1 << 16) flush();
    }
    void flush() {
        std::fwrite(text_.data(), 1, text_.size(), stdout);
        text_.clear();
    }

private:
    fmt::memory_buffer text_;
};

/// Prints one line per extent, with the keys of qemu-img map in their order.
void print_json_extent(Output& out, const qcow::Extent& e, bool first) {
    using Kind = qcow::Extent::Kind;
    out.print(
        "{}{{ \"start\": {}, \"length\": {}, \"depth\": {}, \"present\": {}, \"zero\": {}, \"data\": {}, "
        "\"compressed\": {}",
        first ? "[" : ",\n", e.start.value, e.length, e.depth, e.kind != Kind::unallocated, e.kind != Kind::data,
        e.kind == Kind::data, e.compressed);
    if (e.host) out.print(", \"offset\": {}", e.host->value);
    out.print("}}");
}

void print_text_extent(Output& out, const qcow::Extent& e) {
    using Kind = qcow::Extent::Kind;
    const auto* kind = e.kind == Kind::unallocated ? "unallocated"
                       : e.kind == Kind::zero      ? "zero"
                       : e.compressed              ? "compressed"
                                                   : "data";
    out.print("{:#014x}  {:#14x}  {:>10}  {:>5}  {:<11}", e.start.value, e.length, human(e.length), e.depth, kind);
    if (e.host) out.print("  {:#014x}  {}", e.host->value, qcow::printable(e.storage->name()));
    out.print("\n");
}

qcow::Result<int> run(const MapOptions& options) {
    auto image = open_source(options.source);
    if (!image) return std::unexpected(std::move(image).error());
    auto disk = disk_of(*image, options.source);
    if (!disk) return std::unexpected(std::move(disk).error());
    Output out;
    bool first = true;
    if (!options.json) {
        out.print("{}\n", paint("START                   LENGTH              DEPTH  KIND         HOST OFFSET     FILE",
                                Colour::bold));
    }
    const auto walked =
        qcow::each_extent(**disk, {0}, (*disk)->size(), [&](const qcow::Extent& extent) -> qcow::Result<void> {
            if (options.json) {
                print_json_extent(out, extent, first);
            } else {
                print_text_extent(out, extent);
            }
            first = false;
            return {};
        });
    if (options.json) out.print("{}]\n", first ? "[" : "");
    out.flush();
    if (!walked) return std::unexpected(walked.error());
    return ok;
}

}  // namespace

void declare_map(CLI::App& root, int& status) {
    const auto options = std::make_shared<MapOptions>();
    auto& app = declare(root, status, "map", "Show where the extents of the virtual disk are stored",
                        "DEPTH is the layer that decides: 0 is the image itself, 1 its backing file, and so on.\n"
                        "Zero and unallocated extents read as zeros. For unallocated ones, no layer has an entry.\n"
                        "Example:\n"
                        "  qcow map --json disk.qcow2 | jq '[.[] | select(.data) | .length] | add'",
                        [options] { return run(*options); });
    add_source_options(app, options->source);
    options->source.examines = true;
    add_snapshot_option(app, options->source, "Map this internal snapshot (id or name)");
    add_output_options(app, options->json,
                       "Print a JSON array with one line per extent, in the format of qemu-img map");
}

}  // namespace tool
