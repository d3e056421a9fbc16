// qcow measure: tells how much space a new image needs.

#include "qcow/measure.h"

#include <fmt/format.h>

#include "command.h"
#include "create_options.h"
#include "failure.h"
#include "text.h"

namespace tool {
namespace {

struct MeasureOptions {
    Source source;
    std::string size;
    std::string target_format = "raw";
    NewImageArguments image;
    bool json = false;
};

qcow::Result<qcow::MeasureJob> measure_job(const MeasureOptions& options) {
    const bool has_source = !options.source.path.empty();
    const auto format = *qcow::format_from_name(options.target_format);
    const auto made = QCOW_TRY(parse_create_options(options.image, format));
    if (has_source && !options.size.empty())
        return refuse("", "--size and IMAGE exclude each other; measure the one or the other");
    if (!has_source && !options.source.snapshot.empty()) return refuse("", "--snapshot needs an IMAGE that has it");
    if (!options.size.empty() && made.has("size"))
        return refuse("", "the size is given twice, as --size and as -o size");
    if (!has_source && options.size.empty() && !made.has("size"))
        return refuse("", "there is nothing to measure; give an IMAGE, or --size for an empty image");
    qcow::MeasureJob job{.format = format, .options = made};
    if (!options.size.empty()) job.options.size = parse_size(options.size);
    if (has_source) {
        QCOW_TRY_VOID(verify_is_not_stdin(options.source.path));
        job.source = {QCOW_TRY(spec_of(options.source)), options.source.snapshot};
    }
    return job;
}

qcow::Result<int> run(const MeasureOptions& options) {
    const auto job = QCOW_TRY(measure_job(options));
    const auto measured = QCOW_TRY(qcow::measure(job, {.warn = warn_on_stderr()}));
    if (options.json) {
        Json json = {{"required", measured.required}, {"fully-allocated", measured.fully_allocated}};
        if (measured.bitmaps) json["bitmaps"] = *measured.bitmaps;
        if (measured.data_file) json["data-file"] = *measured.data_file;
        print_json(json);
        return ok;
    }
    fmt::print("required size: {}\n", measured.required);
    fmt::print("fully allocated size: {}\n", measured.fully_allocated);
    if (measured.bitmaps) fmt::print("bitmaps size: {}\n", *measured.bitmaps);
    if (measured.data_file) fmt::print("data file size: {}\n", *measured.data_file);
    return ok;
}

}  // namespace

void declare_measure(CLI::App& root, int& status) {
    const auto options = std::make_shared<MeasureOptions>();
    auto& app = declare(
        root, status, "measure", "Tell how much space a new image needs",
        "Prints the length in bytes of the file that qcow convert makes of IMAGE, or qcow create makes with --size.\n"
        "  required          the length of the new file\n"
        "  fully allocated   its length once all of the disk has been written\n"
        "  bitmaps           for copies of the bitmaps of IMAGE, in addition; less if some bits are clean\n"
        "  data file         the length of the file of -o data_file; the other sizes are without it\n"
        "The command reads the mapping of IMAGE, and no data. qcow convert leaves out clusters of zeros, compresses "
        "with\n"
        "-c, and with -B leaves out what the backing file has. The file is then shorter than the required size.\n"
        "The sizes are those of qcow. qemu-img measure adds the tables of a full disk to the required size, and "
        "counts\n"
        "all of the disk with -o backing_file. It leaves out the holes of preallocation=metadata.\n" +
            std::string(new_image_help) +
            "\nExamples:\n"
            "  qcow measure -O qcow2 disk.raw                    the size after a conversion\n"
            "  qcow measure -O qcow2 --size 1T -o cluster_size=2M --output=json",
        [options] { return run(*options); });
    add_source_options(app, options->source)->required(false);
    options->source.examines = true;
    add_snapshot_option(app, options->source, "Measure this internal snapshot (id or name)");
    app.add_option("--size", options->size, "Measure an empty image of this size, in place of IMAGE")
        ->type_name("SIZE")
        ->check(size_text);
    one_of(app.add_option("-O,--target-format", options->target_format, "Format of the new image"),
           {"raw", "qcow2", "luks"})
        ->capture_default_str();
    add_new_image_options(app, options->image);
    add_output_options(app, options->json, "Print JSON");
}

}  // namespace tool
