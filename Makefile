# The front door. Everything happens in build/; cmake --preset NAME does the same by hand.

SHELL := /bin/bash
JOBS ?= $(shell nproc)
PREFIX ?= /usr/local
FUZZ_SECONDS ?= 60
TORTURE_SECONDS ?= 3600
SOAK_SECONDS ?= 3600

.PHONY: all demo test test-asan test-tsan torture soak soak-guest bench lint lint-changed format fuzz minimal install clean

all: ## Build the tool: build/release/qcow
	@cmake --preset release >/dev/null
	@cmake --build --preset release -j $(JOBS)

demo: ## Install what the build needs, build, and convert a real file-system image
	@scripts/install-dependencies build
	@$(MAKE) --no-print-directory all
	@scripts/demo build/release/qcow

test: ## Install what the tests need, build, and run them all
	@scripts/install-dependencies build test
	@cmake --preset release-tests >/dev/null
	@cmake --build --preset release-tests -j $(JOBS)
	@ctest --test-dir build/release --output-on-failure -j $(JOBS)

test-asan test-tsan: test-%: ## The same tests under the address and undefined-behaviour sanitizers, or the thread sanitizer
	@scripts/install-dependencies build test fuzz
	@cmake --preset $* >/dev/null
	@cmake --build --preset $* -j $(JOBS)
	@ctest --test-dir build/$* --output-on-failure -j $(JOBS)

torture: ## Try to make images lose something for TORTURE_SECONDS (3600), each time from another seed
	@scripts/install-dependencies build test
	@cmake --preset release-tests >/dev/null
	@cmake --build --preset release-tests -j $(JOBS) --target qcow engine_test memory_test server_test
	@scripts/torture build/release $(TORTURE_SECONDS) $(JOBS)

soak: ## Eight threads on every kind of image under the thread sanitizer, for SOAK_SECONDS (3600), from another seed each time
	@scripts/install-dependencies build test
	@cmake --preset tsan >/dev/null
	@cmake --build --preset tsan -j $(JOBS) --target engine_test
	@scripts/soak build/tsan $(SOAK_SECONDS)

soak-guest: ## Sixteen jobs on a disk of a virtual machine, with snapshots meanwhile, for SOAK_SECONDS (3600)
	@scripts/install-dependencies build test
	@cmake --preset release-tests >/dev/null
	@cmake --build --preset release-tests -j $(JOBS) --target qcow server_test
	@QCOW_SEED=$${QCOW_SEED:-random} QCOW_EFFORT=$$(($(SOAK_SECONDS) / 6)) build/release/server_test --gtest_filter='*.MixtureOnAnOverlayWithSnapshots'

bench: ## Measure against qemu-img, qemu-nbd, nbdkit, qemu-storage-daemon, pread and pwrite
	@scripts/install-dependencies build test bench
	@cmake --preset bench >/dev/null
	@cmake --build --preset bench -j $(JOBS) --target qcow engine_bench vhost_load
	@bench/run --qcow build/release/qcow --keep
	@build/release/engine_bench --benchmark_repetitions=5 --benchmark_report_aggregates_only
	@bench/serve --qcow build/release/qcow
	@bench/guest --qcow build/release/qcow
	@bench/mount --qcow build/release/qcow

lint: ## clang-format and clang-tidy
	@scripts/install-dependencies build lint
	@scripts/lint

lint-changed: ## The same, with clang-tidy on no more than what changed
	@scripts/install-dependencies build lint
	@scripts/lint --changed

format: ## Bring all sources into shape
	@scripts/install-dependencies lint
	@git ls-files '*.cpp' '*.h' | xargs clang-format-19 -i

fuzz: ## Run every fuzzer for FUZZ_SECONDS (60), from another seed each time
	@scripts/install-dependencies build test fuzz
	@cmake --preset asan >/dev/null
	@cmake --build --preset asan -j $(JOBS) --target fuzzers
	@scripts/fuzz build/asan $(FUZZ_SECONDS)

minimal: ## Build the tool without any library that is optional, to see that it can be done
	@scripts/install-dependencies build
	@cmake -S . -B build/minimal -G Ninja $(foreach part,TLS FUSE DIGEST ARCHIVE TOML EXT SLEUTH SQUASH,-DQCOW_$(part)=OFF) >/dev/null
	@cmake --build build/minimal -j $(JOBS) --target qcow

install: all ## Install below PREFIX (/usr/local)
	@cmake --install build/release --prefix $(PREFIX)

clean: ## Remove everything that was built
	@rm -rf build
